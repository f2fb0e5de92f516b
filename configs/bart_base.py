"""BART base (arXiv:1910.13461): text infilling and sentence permutation.

Command:   flax-transformers prepare bart_base
           flax-transformers train bart_base --workdir gs://bucket/bart_base
Hardware:  any mesh whose size divides the batch of 8,000, such as 64 chips. A v5e
           chip of these needs phases.0.micro_batches: 57 of 15.75 GiB without (planned)
Data:      TFDS c4/en, in place of RoBERTa's 160 GB, which the original was trained on
Expected:  not run; the paper gives no loss for it

The number of steps and the batch size are those of the large model (§5.1). The paper gives no
learning rate; this one is RoBERTa's for the base size. The vocabulary is a SentencePiece BPE
trained on the corpus. Biases and scales do not decay, which they do in fairseq.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bart import SIZES
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["bart-base"], pad_id=0, bos_id=3, eos_ids=(1,), decoder_start_id=1
        ),
        objective=Denoising(),
        data=TextData(
            source=TextSource("tfds:c4/en"),
            tokenizer=TokenizerConfig("bpe", vocab_size=50265),
            validation_fraction=0.0001,
            shards=1024,
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=6e-4,
            b2=0.98,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=24_000),
        ),
        phases=(Phase(steps=500_000, sequence_length=512, batch_size=8000),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=50_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
