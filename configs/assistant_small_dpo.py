"""Direct preference optimization of the model of assistant_small.py.

Command:   flax-transformers train assistant_small_dpo --workdir runs/assistant_dpo
Data:      the pairs of assistant_small_reward.py
Hardware:  2 CPU cores, 2.5 minutes of CPU (measured while other jobs ran)
Expected:  margin 0.45 to 0.46, 78 to 79 % of held-out pairs in the right order, and fewer right
           answers than before, of digits 25 to 38 %: docs/results/instructions.md says why
           (measured, 3 seeds)
"""

import dataclasses

from assistant_small import get_config as demonstrations
from assistant_small_reward import preferences

from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.preference import DirectPreference
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        demonstrations(),
        init_from="runs/assistant",
        objective=DirectPreference(completions=8),
        data=preferences(),
        optimizer=AdamW(
            learning_rate=1e-4, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=20)
        ),
        phases=(Phase(steps=100, sequence_length=256, batch_size=16),),
        evaluation=Evaluation(every_steps=50),
    )
