"""Direct preference optimization on sorting digits, from the model of llama_tiny_sorting.py.

Command:   flax-transformers train llama_tiny_sorting_dpo --init-from runs/sorting \\
               --workdir runs/sorting_dpo
Data:      the pairs of llama_tiny_sorting_reward.py
Hardware:  2 CPU cores, 2 to 3 minutes (measured while other jobs ran)
Expected:  held-out margin from 0 to 1.77, 2.13 and 2.39, accuracy of pairs 97 to 98 %. Of held-out
           strings 38, 23 and 30 % are sorted exactly, 27, 37 and 29 % before: what is learned of
           corrupted answers does not carry over to the model's own (measured, 3 seeds)
"""

import dataclasses

from llama_tiny_sorting import get_config as demonstrations
from llama_tiny_sorting_reward import preferences

from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.preference import DirectPreference
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        demonstrations(),
        objective=DirectPreference(completions=4),
        data=preferences(),
        optimizer=AdamW(
            learning_rate=3e-4, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=20)
        ),
        phases=(Phase(steps=100, sequence_length=96, batch_size=64),),
        evaluation=Evaluation(every_steps=10, batch_size=64),
        logging=Logging(every_steps=10),
    )
