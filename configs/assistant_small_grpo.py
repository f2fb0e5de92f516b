"""GRPO on instructions whose answers can be checked, from the model of assistant_small.py.

Command:   flax-transformers train assistant_small_grpo --workdir runs/assistant_grpo
           flax-transformers evaluate RUN --config assistant_small_grpo      # of any stage
Data:      of benchmarks/instructions.py: instructions of four of the tasks that are not among the
           demonstrations; held out are 256 of each task, from the test sets
Hardware:  2 CPU cores, 6 to 7 minutes of CPU (measured while other jobs ran)
Expected:  digits 89.5 to 98.0 % right, 4.7 to 10.1 points more than before; intents 41.0 to 48.0 %
           (measured, 3 seeds; docs/results/instructions.md)
"""

import dataclasses

from assistant_small import FOLDER, TOKENIZER
from assistant_small import get_config as demonstrations

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.reinforcement.policy import GroupRelativePolicy, Rollouts
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

TASKS = ("intents", "tags", "translations", "sums", "digits")


def instructions(path: str) -> PairSource:
    return PairSource(f"{FOLDER}/{path}", source_field="prompt", target_field="answer")


def get_config() -> TrainConfig:
    sets = tuple(EvaluationSet(task, instructions(f"held_out/{task}.jsonl")) for task in TASKS)
    return dataclasses.replace(
        demonstrations(),
        init_from="runs/assistant",
        objective=GroupRelativePolicy(
            rollouts=Rollouts(rewards=(ExactAnswer(),), completion_length=32, group_size=8)
        ),
        data=TextData(
            source=instructions("prompts"),
            tokenizer=TOKENIZER,
            validation_fraction=0.0,
            shards=1,
        ),
        optimizer=AdamW(
            learning_rate=3e-4, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=10)
        ),
        phases=(Phase(steps=60, sequence_length=96, batch_size=256),),
        evaluation=Evaluation(every_steps=30, batch_size=256, sets=sets),
        logging=Logging(every_steps=5),
    )
