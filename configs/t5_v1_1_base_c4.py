"""T5 1.1 base on C4: span corruption without dropout (arXiv:1910.10683, arXiv:2002.05202).

Command:   flax-transformers prepare t5_v1_1_base_c4
           flax-transformers train t5_v1_1_base_c4 --workdir gs://bucket/t5_v1_1_base_c4
Hardware:  written for a TPU v5e slice of 128 chips: batches of 2,048 sequences of 512 tokens
Data:      TFDS c4/en, prepared with the ``prepare`` extra
Expected:  not run
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.t5 import SIZES
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.optim.optimizers import Adafactor
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["t5-v1_1-base"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        objective=SpanCorruption(z_loss=1e-4),
        data=TextData(
            source=TextSource("tfds:c4/en"),
            tokenizer=TokenizerConfig("unigram", vocab_size=32100, sentinels=100),
            validation_fraction=0.0001,
            shards=1024,
            workers=8,
        ),
        optimizer=Adafactor(),
        phases=(Phase(steps=1_000_000, sequence_length=512, batch_size=2048),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
