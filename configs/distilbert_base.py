"""DistilBERT, its published size, trained by masked language modelling without a teacher.

Command:   flax-transformers prepare distilbert_base   (once; hours, on any machine)
           flax-transformers train distilbert_base --workdir gs://bucket/distilbert_base
Hardware:  written for a TPU v5e slice of 16 chips, 4x4
Data:      TFDS wikipedia/20230601.en, prepared with the ``prepare`` extra; for your own text set
           --data.source.path to a file, a folder or a glob
Expected:  not run. The published model, which learned from BERT base as well, reaches 82.2 % on
           MNLI after fine-tuning (arXiv:1910.01108, table 1)
Planned:   not run. --topology v5e:4x4: 6.3 of 15.75 GiB per chip, a step time of at least
           0.212 s, an MFU of at most 95.6 %

Differences from the original: the loss has neither the teacher's probabilities nor its hidden
states, and the layers start from random weights instead of every other layer of BERT base.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.distilbert import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["distilbert-base"],
        objective=MaskedLM(),
        data=TextData(
            source=TextSource("tfds:wikipedia/20230601.en"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=30522, lowercase=True),
            validation_fraction=0.001,
            shards=256,
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=5e-4,
            b2=0.98,
            weight_decay=0.0,
            max_grad_norm=5.0,
            schedule=Schedule("linear", warmup_steps=5_000),
        ),
        phases=(Phase(steps=100_000, sequence_length=512, batch_size=4096, micro_batches=4),),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=25_000),
        evaluation=Evaluation(every_steps=5_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
