"""UL2 at base size: a mixture of seven denoisers on C4 (arXiv:2205.05131 §4).

Command:   flax-transformers prepare ul2_base
           flax-transformers train ul2_base --workdir gs://bucket/ul2_base
Hardware:  written for a TPU v5e slice of 32 chips: batches of 128 sequences of 512 tokens
Data:      TFDS c4/en, prepared with the ``prepare`` extra
Expected:  not run

The tokenizer has 128 sentinels, where the original has 100: a denoiser that masks half of a
sequence of 512 tokens in spans of three needs more than 100.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.t5 import SIZES
from flax_transformers.objectives.mixture_of_denoisers import MixtureOfDenoisers
from flax_transformers.optim.optimizers import Adafactor
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["t5-v1_1-base"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        objective=MixtureOfDenoisers(),
        data=TextData(
            source=TextSource("tfds:c4/en"),
            tokenizer=TokenizerConfig("unigram", vocab_size=32128, sentinels=128),
            validation_fraction=0.0001,
            shards=1024,
            workers=8,
        ),
        optimizer=Adafactor(),
        phases=(Phase(steps=500_000, sequence_length=512, batch_size=128),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
