"""ELECTRA base on English Wikipedia (arXiv:2003.10555, appendix A).

Command:   flax-transformers prepare electra_base      (once; hours, on any machine)
           flax-transformers train electra_base --workdir gs://bucket/electra_base
Hardware:  any mesh whose size divides the batch of 256; written for a TPU v5e slice of 16 chips
Data:      TFDS wikipedia/20230601.en, prepared with the ``prepare`` extra; for your own text set
           --data.source.path to a file, a folder or a glob
Expected:  not run. The paper reports a GLUE score of 85.1 for the discriminator after fine-tuning,
           with books as well in the corpus.
Cannot be exported: as one model. Of a run, `flax-transformers convert --architecture
           ElectraForPreTraining` writes the discriminator, and ElectraForMaskedLM the generator.

Differences from the original: sequences cross document boundaries, and Adam uses bias correction.
"""

from dataclasses import replace

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.electra import SIZES
from flax_transformers.objectives.replaced_tokens import ReplacedTokenDetection
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=replace(SIZES["electra-base-discriminator"], architecture="ElectraWithGenerator"),
        objective=ReplacedTokenDetection(),
        data=TextData(
            source=TextSource("tfds:wikipedia/20230601.en"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=30522, lowercase=True),
            validation_fraction=0.001,
            shards=256,
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=2e-4,
            eps=1e-6,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=10_000),
        ),
        phases=(Phase(steps=766_000, sequence_length=512, batch_size=256),),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
