"""RoBERTa base (arXiv:1907.11692, table 9): full sentences, dynamic masking, large batches.

Command:   flax-transformers prepare roberta_base
           flax-transformers train roberta_base --workdir gs://bucket/roberta_base
Hardware:  a TPU v5e slice of 256 chips, 16x16: 13.8 of 15.75 GiB and at least 0.075 s a step of
           8,192 sequences of 512 tokens (planned, not run)
Data:      TFDS c4/en, in place of the paper's 160 GB, which are not public as a whole
Expected:  not run. Table 3 of the paper reports a perplexity of 3.68, a held-out loss of 1.30,
           after 1M steps of 256 sequences of books and Wikipedia

Differences from the original: the vocabulary is a SentencePiece BPE with padding id 0, trained on
the corpus, instead of GPT-2's byte-level BPE; biases and scales do not decay, which they do in
fairseq.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.roberta import RobertaConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=RobertaConfig(pad_id=0, position_offset=1),
        objective=MaskedLM(),
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
            max_grad_norm=None,
            schedule=Schedule("linear", warmup_steps=24_000),
        ),
        phases=(Phase(steps=500_000, sequence_length=512, batch_size=8192),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=50_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
