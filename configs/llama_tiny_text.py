"""The tiny Llama of llama_tiny_sorting.py, pretrained on the bytes of Python's documentation.

Command:   flax-transformers train llama_tiny_text --workdir runs/text
Data:      the documentation that is included in every Python installation; 2 % of it are held out
Hardware:  2 CPU cores, 1 minute (measured while other jobs ran)
Expected:  held-out loss 1.98 nats per byte, unigram baseline 3.33; it sorts no digits (measured,
           one seed, CPython 3.11.7)
"""

import dataclasses

from llama_tiny_sorting import get_config as demonstrations

from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        demonstrations(),
        data=TextData(tokenizer=TokenizerConfig("bytes"), validation_fraction=0.02, shards=1),
        phases=(Phase(steps=400, sequence_length=64, batch_size=32),),
        evaluation=Evaluation(every_steps=200, batch_size=64),
    )
