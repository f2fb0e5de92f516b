"""ALBERT base on English Wikipedia, with sentence-order prediction (arXiv:1909.11942 section 4.1).

Command:   flax-transformers prepare albert_base      (once; hours, on any machine)
           flax-transformers train albert_base --workdir gs://bucket/albert_base
Hardware:  a TPU v5e slice of 64 chips, 8x8
Data:      TFDS wikipedia/20230601.en, prepared with the ``prepare`` extra; for your own text set
           --data.source.path to a file, a folder or a glob
Expected:  not run. Table 2 of the paper reports 81.6 % on MNLI after fine-tuning, with books in the
           corpus as well
Planned:   not run. --topology v5e:8x8: 10.3 of 15.75 GiB per chip, a step time of at least
           0.100 s, an MFU of at most 95.4 %

Differences from the original: single words are masked instead of runs of up to three, and no
example is shortened at random.
"""

from dataclasses import replace

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.albert import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.next_sentence import SentenceOrder
from flax_transformers.optim.optimizers import LAMB
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=replace(SIZES["albert-base-v2"], architecture="AlbertForPreTraining"),
        objective=SentenceOrder(choose="word"),
        data=TextData(
            source=TextSource("tfds:wikipedia/20230601.en"),
            tokenizer=TokenizerConfig("unigram", vocab_size=30000, lowercase=True),
            validation_fraction=0.001,
            shards=256,
            workers=8,
        ),
        optimizer=LAMB(learning_rate=1.76e-3, schedule=Schedule("linear", warmup_steps=3_125)),
        phases=(Phase(steps=125_000, sequence_length=512, batch_size=4096),),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=1_000, keep_every=25_000),
        evaluation=Evaluation(every_steps=5_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
