"""DeBERTa-v3 base, its published size, trained by masked language modelling.

Command:   flax-transformers prepare deberta_v3_base   (once; hours, on any machine)
           flax-transformers train deberta_v3_base --workdir gs://bucket/deberta_v3_base
Hardware:  written for a TPU v5e slice of 256 chips, 16x16
Data:      TFDS c4/en, in place of the paper's 160 GB, which are not public as a whole
Expected:  not run. The published model, which was trained as a discriminator, reaches 90.6 % on
           MNLI after fine-tuning (arXiv:2111.09543)
Planned:   not run. --topology v5e:16x16: 6.5 of 15.75 GiB per chip, a step time of at least
           0.761 s, an MFU of at most 7.8 %: it is bound by memory
           bandwidth, because attention holds float32 scores of all 2 T - 1 distances

Differences from the original: it predicts masked tokens, as version 2 did (arXiv:2006.03654), and
not which ones a generator replaced. electra_base.py does that, without the paper's sharing of
embeddings.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.deberta_v2 import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["deberta-v3-base"],
        objective=MaskedLM(choose="word"),
        data=TextData(
            source=TextSource("tfds:c4/en"),
            tokenizer=TokenizerConfig("unigram", vocab_size=128_100),
            validation_fraction=0.0001,
            shards=1024,
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=6e-4,
            b2=0.98,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=10_000),
        ),
        phases=(Phase(steps=500_000, sequence_length=512, batch_size=8192, micro_batches=2),),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=50_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
