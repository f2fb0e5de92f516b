"""A tiny ELECTRA on the documentation that is included in every Python installation.

Command:   flax-transformers train electra_tiny --workdir runs/electra_tiny
Hardware:  2 CPU cores, 16 minutes (measured while other jobs ran)
Expected:  held-out loss of the generator 5.06, unigram baseline 5.94; detection loss 0.362, with
           12.5 % of the tokens replaced, whose entropy is 0.376 (measured, one seed, 2 CPU cores,
           CPython 3.11). The discriminator has only begun to learn: it finds 1 % of the replaced
           tokens.
Cannot be exported: as one model. Of a run, `flax-transformers convert --architecture
           ElectraForPreTraining` writes the discriminator, and ElectraForMaskedLM the generator.

The generator has half of the discriminator's width. electra_base.py has the published shape.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.electra import ElectraConfig
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.replaced_tokens import ReplacedTokenDetection
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ElectraConfig(
            architecture="ElectraWithGenerator",
            vocab_size=4096,
            hidden_size=256,
            num_layers=2,
            num_heads=4,
            intermediate_size=1024,
            embedding_size=128,
            generator_divisor=2,
            max_positions=64,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=ReplacedTokenDetection(),
        data=TextData(
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.05,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=600, sequence_length=64, batch_size=32),),
        compute=ComputeConfig(dtype="auto"),
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=Evaluation(every_steps=200, batch_size=64),
        logging=Logging(every_steps=10),
        seed=0,
    )
