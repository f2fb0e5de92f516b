"""Tiny runs of reinforcement learning, and what interrupts them."""

import dataclasses
import os
import time

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.dataset import prepare
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.problems import Problems
from flax_transformers.post_training.reinforcement.held_out_rewards import reward_evaluator
from flax_transformers.post_training.reinforcement.policy import GroupRelativePolicy, Rollouts
from flax_transformers.post_training.reinforcement.rewards import FunctionReward
from flax_transformers.post_training.reinforcement.rollouts import batch_source
from flax_transformers.training import loop
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

FAULT: list[int] = []
"""Calls after which `odd` fails; empty: never."""
SLOW = "FIRST_REWARD_SECONDS"
"""Environment variable: how long the first call of `odd` takes."""


def odd(prompts, completions, rows):
    """The share of characters with an odd number."""
    time.sleep(float(os.environ.pop(SLOW, "0")))
    if FAULT:
        FAULT[0] -= 1
        if FAULT[0] < 0:
            raise ValueError("the judge is out")
    return [sum(ord(c) % 2 for c in text) / (1 + len(text)) for text in completions]


def config_for(steps=8, lora=None, seed=0, sequence_length=16, data=None, **changes):
    rollouts = {"batches": 2, "epochs": 2, "group_size": 4, "completion_length": 4}
    own = {f.name for f in dataclasses.fields(Rollouts)} & changes.keys()
    rollouts |= {name: changes.pop(name) for name in own}
    return TrainConfig(
        model=LlamaConfig(
            vocab_size=262,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            intermediate_size=16,
            max_positions=32,
            bos_id=None,
            eos_ids=(1,),
            pad_id=0,
        ),
        objective=GroupRelativePolicy(
            rollouts=Rollouts(rewards=(FunctionReward(function=odd),), **rollouts), **changes
        ),
        data=data or Problems(task="copying", digits=2, training=50, held_out=6),
        optimizer=AdamW(learning_rate=1e-2, schedule=Schedule("constant", warmup_steps=1)),
        phases=(Phase(steps, sequence_length, 8),),
        lora=lora or LoraConfig(),
        checkpoints=CheckpointConfig(every_steps=3, keep_latest=5),
        evaluation=Evaluation(every_steps=0, batch_size=4),
        logging=Logging(every_steps=1, tensorboard=False, example_log=True),
        seed=seed,
    )


def run(config, workdir, callbacks=(), evaluate=False):
    prepared = prepare(config.data)
    evaluators, scorers = [], {}
    if evaluate:
        evaluators = [reward_evaluator(config, prepared, build_model(config.model), scorers)]
    return loop.train_prepared(
        config,
        prepared,
        workdir,
        evaluators,
        callbacks=callbacks,
        online=batch_source(config, None, scorers),
    )


class Dies(ft.Callback):
    """Ends the run after a step, without saving anything, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, state):
        if step == self.step:
            raise RuntimeError("killed")


def rows_of(workdir):
    """Training metrics by step, without times."""
    rows = {row["step"]: row for row in read_metrics(workdir) if "train/loss" in row}
    kept = ("train", "policy", "rollout", "optimizer")
    return {
        step: {name: value for name, value in row.items() if name.startswith(kept)}
        for step, row in rows.items()
    }
