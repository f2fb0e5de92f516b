"""Held-out data, each example once: the objective's own metrics, and the model's predictions, the
same on all hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.pipeline.examples import Examples, Subset
from flax_transformers.data.pipeline.loader import evaluation_batches
from flax_transformers.monitoring.metrics import Accumulator, fetched_one_behind
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ModelFunctions,
    Objective,
    Params,
    Vocabulary,
)
from flax_transformers.parallel.rules import batch_sharding, check_batch_size, host_rows, place_rows
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import compile_evaluation_step

EVALUATION_SEED = 0
"""Seed of masks in evaluation. It is the same for every run, so that their scores compare."""


def held_out_evaluator(config: TrainConfig, prepared: Dataset) -> Evaluator:
    """A function that scores a snapshot on the validation split, as ``{"eval/loss": ...}``.

    In a mixture each component is also scored by itself, ``"eval/loss_NAME"``. Masks are fixed, the
    last batch is padded with rows of weight zero, and all processes get the same scores.
    """
    settings, objective = config.evaluation, config.objective

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        check_batch_size(settings.batch_size, 1, snapshot.mesh, name="evaluation.batch_size")
        sharding = batch_sharding(snapshot.mesh)
        rows = host_rows(sharding, settings.batch_size)
        length = snapshot.phase.sequence_length

        def score(local: dict[str, np.ndarray]) -> Any:
            local.pop("example_id")
            batch = place_rows(local, rows, sharding, settings.batch_size)
            return snapshot.evaluation_step(snapshot.params, batch)

        whole = Accumulator()
        found: dict[str, float] = {}
        for part, examples in _held_out_parts(config, prepared, length):
            totals = Accumulator()
            batches = scored_batches(config, examples, objective, prepared.vocabulary, length, rows)
            for sums in fetched_one_behind(map(score, batches)):
                totals.add(sums)
                whole.add(sums)
            if part:
                found |= {f"eval/{name}_{part}": mean for name, mean in totals.means().items()}
        return {f"eval/{name}": mean for name, mean in whole.means().items()} | found

    return evaluate


def held_out_batches(
    config: TrainConfig, prepared: Dataset, length: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of evaluation, in rows of ``length``; none if nothing is held out.

    ``rows`` are those of each batch that this host makes, by default all; see
    `evaluation_batches`. No batch holds examples of two components of a mixture.
    """
    for _, examples in _held_out_parts(config, prepared, length):
        objective, vocabulary = config.objective, prepared.vocabulary
        yield from scored_batches(config, examples, objective, vocabulary, length, rows)


def _held_out_parts(
    config: TrainConfig, prepared: Dataset, length: int
) -> Iterator[tuple[str, Examples]]:
    """The held-out examples of each component of a mixture by name; other data under ""."""
    examples = prepared.examples("validation", config.objective.window_spec(length))
    if examples is not None:
        yield from examples.components


def scored_batches(
    config: TrainConfig,
    examples: Examples,
    objective: Objective,
    vocabulary: Vocabulary,
    length: int,
    rows: np.ndarray | None,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of the examples that a run is scored on, prepared by an ``objective``; see
    `held_out_batches`."""
    chosen = scored_examples(examples, config.evaluation.max_examples)
    batches = evaluation_batches(
        Subset(examples, chosen),
        objective,
        vocabulary,
        sequence_length=length,
        batch_size=config.evaluation.batch_size,
        rows=rows,
        seed=EVALUATION_SEED,
    )
    for batch in batches:
        numbers = batch["example_id"]
        yield {**batch, "example_id": np.where(numbers < 0, -1, chosen[numbers])}


def scored_examples(examples: Examples, count: int | None) -> np.ndarray:
    """Indices of the examples that are scored: all, or ``count`` evenly spread over them, because a
    corpus may be sorted by class or by book. int64 [n], increasing.

    Where several examples are windows of one question (``scored_in_order``) they are the first
    ``count``.
    """
    if examples.scored_in_order:
        return np.arange(len(examples))[:count]
    return evenly_spread(len(examples), count)


def evenly_spread(total: int, count: int | None) -> np.ndarray:
    """``count`` evenly spaced indices below ``total``, or all of them: int64 [n]."""
    count = min(total, count or total)
    return np.arange(count) * total // max(count, 1)


T = TypeVar("T")


@runtime_checkable
class Predicts(Objective, Protocol):
    """An objective whose scores need the predictions of each example, not only sums."""

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """Predictions and references for each row of a batch, arrays [B, ...] by name."""


Predictions = Callable[[Snapshot], Iterator[dict[str, np.ndarray]]]


def held_out_predictions(config: TrainConfig, prepared: Dataset) -> Predictions:
    """A function of a snapshot that yields its predictions for held-out rows, batch by batch.

    The arrays are those of the objective's ``predict``, and ``example_id`` int32 [B]. Padding rows
    of the last batch are left out. Every host gets the rows of all hosts.
    """
    objective = config.objective
    if not isinstance(objective, Predicts):
        raise TypeError(f"{type(objective).__name__} has no predict")
    size = config.evaluation.batch_size
    compiled = once_per_mesh(lambda s: prediction_step(objective, s.functions, s.params, s.mesh))

    def predict(snapshot: Snapshot) -> Iterator[dict[str, np.ndarray]]:
        rows = rows_of_host(snapshot.mesh, size)
        batches = held_out_batches(config, prepared, snapshot.phase.sequence_length, rows)
        step = compiled(snapshot)
        yield from predicted(step, snapshot.params, batches, snapshot.mesh, size)

    return predict


def once_per_mesh(compiled: Callable[[Snapshot], T]) -> Callable[[Snapshot], T]:
    """``compiled``, called for the first snapshot on each mesh only."""
    found: dict[Mesh, T] = {}

    def of_mesh(snapshot: Snapshot) -> T:
        if snapshot.mesh not in found:
            found[snapshot.mesh] = compiled(snapshot)
        return found[snapshot.mesh]

    return of_mesh


def rows_of_host(mesh: Mesh, batch_size: int, name: str = "evaluation.batch_size") -> np.ndarray:
    """The rows of each batch that this host makes. Raises UserError, with the ``name`` of the
    setting, if a batch does not divide over the mesh."""
    check_batch_size(batch_size, 1, mesh, name=name)
    return host_rows(batch_sharding(mesh), batch_size)


def prediction_step(
    objective: Predicts, functions: ModelFunctions, params: Params, mesh: Mesh
) -> Callable[..., Any]:
    """The compiled ``predict`` of an objective, ``(params, batch)``; it keeps ``example_id``."""

    def prediction_step(params: Params, batch: Batch) -> dict[str, Array]:
        found = objective.predict(functions, params, batch)
        return {**found, "example_id": batch["example_id"]}

    return compile_evaluation_step(prediction_step, params, mesh)


def predicted(
    step: Callable[..., Any],
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The predictions of a `prediction_step` for this host's rows of ``batches``: those of all
    hosts, without rows whose ``example_id`` is negative."""
    sharding, rows = batch_sharding(mesh), rows_of_host(mesh, batch_size)

    def dispatch(local: dict[str, np.ndarray]) -> dict[str, Array]:
        local["example_id"] = local["example_id"].astype(np.int32)
        return step(params, place_rows(local, rows, sharding, batch_size))

    for found in fetched_one_behind(map(dispatch, batches)):
        real = found["example_id"] >= 0
        yield {name: np.asarray(values)[real] for name, values in found.items()}
