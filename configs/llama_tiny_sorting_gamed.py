"""Reward hacking: GRPO with a reward for digits in order, whichever they are.

Command:   flax-transformers train llama_tiny_sorting_gamed --init-from runs/sorting \\
               --workdir runs/sorting_gamed
Hardware:  2 CPU cores, 1.5 minutes (measured while other jobs ran)
Expected:  the held-out reward rises from 95 to 100 %, and strings that are sorted exactly fall
           from 27 to 5 % (measured, one seed; docs/results/sorting_stages.md)
"""

import dataclasses

from llama_tiny_sorting_grpo import get_config as grpo

from flax_transformers.post_training.reinforcement.policy import GroupRelativePolicy, Rollouts
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer, MatchesPattern
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    base = grpo()
    in_order = MatchesPattern(pattern="0*1*2*3*4*5*6*7*8*9*")
    rewards = (in_order, ExactAnswer(weight=0.0))  # the second is only logged
    return dataclasses.replace(
        base,
        objective=GroupRelativePolicy(
            rollouts=Rollouts(rewards=rewards, completion_length=10, group_size=8)
        ),
        phases=(Phase(steps=100, sequence_length=32, batch_size=256),),
        evaluation=Evaluation(every_steps=10, batch_size=256),
    )
