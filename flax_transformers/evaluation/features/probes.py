"""Probes: how well the classes of images can be told from the frozen features of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from flax_transformers.data.dataset import Dataset, training_examples
from flax_transformers.data.pipeline.examples import Examples, Subset
from flax_transformers.data.pipeline.loader import ordered_batches
from flax_transformers.errors import UserError
from flax_transformers.evaluation.baselines import of_set
from flax_transformers.evaluation.features.classifiers import linear_probe, nearest_neighbours
from flax_transformers.evaluation.features.embedding import encoder_of, image_embedding
from flax_transformers.evaluation.held_out import EVALUATION_SEED, scored_examples
from flax_transformers.evaluation.predictions import (
    once_per_shape,
    predicted,
    prediction_step,
    rows_of_host,
)
from flax_transformers.models.config import VisionConfig
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.images import PixelInput
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import model_functions

log = logging.getLogger(__name__)

_NO_TEXT = Vocabulary(size=1, pad_id=0)
Features = tuple[np.ndarray, np.ndarray]
"""float32 [N, D], and the classes, int32 [N]."""


def probe_evaluator(
    config: TrainConfig, prepared: Dataset, model: nn.Module, sets: Sequence[tuple[str, Dataset]]
) -> Evaluator:
    """A function of a snapshot: ``{"eval/knn_accuracy", "eval/linear_probe_accuracy"}`` for the
    probes of the config, and the same of each evaluation set.

    The features of the training examples, or of the subset that ``config.data`` asks for, without
    augmentation, are what the probes learn from. Raises UserError for models and data without
    images that have classes.
    """
    pixels, classes = config.objective, len(prepared.label_names)
    if not isinstance(config.model, VisionConfig) or not isinstance(pixels, PixelInput):
        raise UserError("evaluation.probes are for models of images; leave evaluation.probes empty")
    if not classes:
        raise UserError("evaluation.probes need images with classes, and the data has none")
    functions = model_functions(encoder_of(model))
    objective: Any = image_embedding(config.model, pixels, None)
    parts = [("", prepared), *sets]
    compiled = once_per_shape(lambda s: prediction_step(objective, functions, s.params, s.mesh))

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        step = compiled(snapshot)
        spec = objective.window_spec(snapshot.phase.sequence_length)
        chosen = training_examples(prepared, spec, config.data, config.seed)
        train = _features(config, objective, chosen.plain, step, snapshot)
        scores: dict[str, float] = {}
        for name, part in parts:
            examples = part.examples("validation", spec)
            if examples is None:
                continue
            few = Subset(examples, scored_examples(examples, config.evaluation.max_examples))
            test = _features(config, objective, few, step, snapshot)
            found = _accuracies(config.evaluation.probes, train, test, classes)
            scores |= {of_set(key, name) if name else key: score for key, score in found.items()}
        return scores

    return evaluate


def _accuracies(
    probes: Sequence[str], train: Features, test: Features, classes: int
) -> dict[str, float]:
    found = {}
    for probe in probes:
        if probe == "knn":
            predicted = nearest_neighbours(*train, test[0], classes)
            found["eval/knn_accuracy"] = float((predicted == test[1]).mean())
        else:
            predicted, penalty = linear_probe(*train, test[0], classes)
            log.info("linear probe of %d examples: penalty %g", len(train[0]), penalty)
            found["eval/linear_probe_accuracy"] = float((predicted == test[1]).mean())
    return found


def _features(
    config: TrainConfig,
    objective: Any,
    examples: Examples,
    step: Callable[..., Any],
    snapshot: Snapshot,
) -> Features:
    """The features of all examples, on every host."""
    size, mesh = config.evaluation.batch_size, snapshot.mesh
    batches = ordered_batches(
        examples,
        objective,
        _NO_TEXT,
        sequence_length=snapshot.phase.sequence_length,
        batch_size=size,
        rows=rows_of_host(mesh, size),
        seed=EVALUATION_SEED,
    )
    found = list(predicted(step, snapshot.params, batches, mesh, size))
    return (
        np.concatenate([batch["embedding"] for batch in found]),
        np.concatenate([batch["labels"] for batch in found]),
    )
