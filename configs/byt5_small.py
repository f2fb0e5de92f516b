"""ByT5 small: span corruption on bytes with a mean span of 20 bytes (arXiv:2105.13626).

Command:   flax-transformers prepare byt5_small
           flax-transformers train byt5_small --workdir gs://bucket/byt5_small
Hardware:  written for a TPU v5e slice of 128 chips: batches of 1,024 sequences of 1,024 bytes
Data:      TFDS c4/en, prepared with the ``prepare`` extra, where the paper mixes all languages of
           mC4. For another one: --data.source.path tfds:c4/multilingual --data.source.split de
Expected:  not run
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.t5 import SIZES
from flax_transformers.objectives.span_corruption import BYT5_MEAN_SPAN, SpanCorruption
from flax_transformers.optim.optimizers import Adafactor
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["byt5-small"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        objective=SpanCorruption(mean_span=BYT5_MEAN_SPAN, z_loss=1e-4),
        data=TextData(
            source=TextSource("tfds:c4/en"),
            tokenizer=TokenizerConfig("bytes"),
            validation_fraction=0.0001,
            shards=1024,
            workers=8,
        ),
        optimizer=Adafactor(),
        phases=(Phase(steps=1_000_000, sequence_length=1024, batch_size=1024),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
