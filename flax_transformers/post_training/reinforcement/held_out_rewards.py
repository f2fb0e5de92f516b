"""Rewards of a model's completions of held-out prompts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flax_transformers.data.dataset import Dataset
from flax_transformers.generation.sampling import Sampling
from flax_transformers.parallel.rules import check_batch_size
from flax_transformers.post_training.reinforcement.policy import PolicyObjective
from flax_transformers.post_training.reinforcement.rollouts import (
    Sampler,
    Scorers,
    prompt_of,
    required_tokenizer,
    scorer_on,
)
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig

GREEDY = Sampling()


def reward_evaluator(
    config: TrainConfig, prepared: Dataset, model: nn.Module, scorers: Scorers
) -> Evaluator:
    """A function that scores greedy completions of the held-out prompts by the rewards of the
    objective: "eval/reward", "eval/NAME" of each reward, and properties of the completions.

    Without held-out prompts it gives no scores. ``scorers``: those of the run.
    """
    objective = config.objective
    assert isinstance(objective, PolicyObjective)
    settings, samplers = objective.rollouts, dict[int, Sampler]()

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        length, size = snapshot.phase.sequence_length, config.evaluation.batch_size
        examples = prepared.examples("validation", objective.window_spec(length))
        if examples is None or not len(examples):
            return {}
        check_batch_size(size, 1, snapshot.mesh, name="evaluation.batch_size")
        count = min(len(examples), config.evaluation.max_examples or len(examples))
        prompts = [
            prompt_of(
                examples.read(number * len(examples) // count, np.random.default_rng(0)),
                config,
                prepared,
                length,
            )
            for number in range(count)
        ]
        if length not in samplers:
            samplers[length] = Sampler(
                model,
                snapshot.mesh,
                required_tokenizer(prepared),
                prepared.vocabulary,
                rows=size,
                prompt_length=objective.prompt_length(length),
                completion_length=settings.completion_length,
            )
        completions = samplers[length](snapshot.params, prompts, GREEDY, jax.random.key(0))
        scorer = scorer_on(snapshot.mesh, settings.rewards, scorers)
        scores = scorer(prompts, completions.texts)
        found: dict[str, Any] = {
            "reward": scores @ scorer.weights,
            "completion_length": [len(ids) for ids in completions.ids],
            "truncated": ~completions.ended,
        } | dict(zip(scorer.names, scores.T, strict=True))
        return {f"eval/{name}": float(np.mean(values)) for name, values in found.items()}

    return evaluate
