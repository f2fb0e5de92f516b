"""BERT base on English Wikipedia, the original recipe in two phases (arXiv:1810.04805 §A.2).

Command:   flax-transformers prepare bert_base      (once; hours, on any machine)
           flax-transformers train bert_base --workdir gs://bucket/bert_base
Hardware:  any mesh whose size divides the batch of 256; written for a TPU v5e slice of 16 chips
Data:      TFDS wikipedia/20230601.en, prepared with the ``prepare`` extra; for your own text set
           --data.source.path to a file, a folder or a glob
Expected:  not run. Table 6 of the paper reports a masked-LM perplexity of 3.99, which is a held-out
           loss of 1.38. The paper's corpus also contained books, and it trained with the
           next-sentence loss, so this is an estimate.

Differences from the original: no next-sentence loss, sequences cross document boundaries, and Adam
uses bias correction.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import SIZES
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["bert-base"],
        objective=MaskedLM(),
        data=TextData(
            source=TextSource("tfds:wikipedia/20230601.en"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=30522, lowercase=True),
            validation_fraction=0.001,
            shards=256,
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=1e-4,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=10_000),
        ),
        phases=(
            Phase(steps=900_000, sequence_length=128, batch_size=256),
            Phase(steps=100_000, sequence_length=512, batch_size=256),
        ),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
