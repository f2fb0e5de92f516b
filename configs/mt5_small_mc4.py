"""mT5 small on mC4: span corruption in 101 languages (arXiv:2010.11934).

Command:   flax-transformers prepare mt5_small_mc4 --begin
           flax-transformers prepare mt5_small_mc4 --shard $SLURM_ARRAY_TASK_ID/256
           flax-transformers prepare mt5_small_mc4
           flax-transformers train mt5_small_mc4 --workdir gs://bucket/mt5_small_mc4
Hardware:  written for a TPU v5e slice of 128 chips: batches of 1,024 sequences of 1,024 tokens
Data:      TFDS c4/multilingual, prepared with the ``prepare`` extra; the published tokenizer,
           spiece.model of google/mt5-small
Expected:  not run

The paper samples a language with n pages in proportion to n**0.3; here n is its number of tokens.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.t5 import SIZES
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.optim.optimizers import Adafactor
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

LANGUAGES = (
    "af am ar az be bg bn ca ceb co cs cy da de el en eo es et eu fa fi fil fr fy ga gd gl gu ha "
    "haw hi hmn ht hu hy id ig is it iw ja jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn "
    "mr ms mt my ne nl no ny pa pl ps pt ro ru sd si sk sl sm sn so sq sr st su sv sw ta te tg th "
    "tr uk ur uz vi xh yi yo zh zu"
).split()


def _language(name: str) -> Component:
    return Component(
        name=name,
        source=TextSource("tfds:c4/multilingual", split=name),
        validation_source=TextSource("tfds:c4/multilingual", split=f"{name}-validation"),
    )


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["mt5-small"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        objective=SpanCorruption(z_loss=1e-4),
        data=MixedText(
            components=tuple(map(_language, LANGUAGES)),
            exponent=0.3,
            tokenizer=TokenizerConfig("unigram", vocab_size=250_100, path="mt5/spiece.model"),
            shards=256,
            workers=8,
        ),
        optimizer=Adafactor(),
        phases=(Phase(steps=1_000_000, sequence_length=1024, batch_size=1024),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=256),
        logging=Logging(every_steps=100),
    )
