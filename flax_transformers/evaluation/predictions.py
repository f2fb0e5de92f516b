"""A model's predictions for held-out examples, each example once, the same on all hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from flax_transformers.data.dataset import Dataset
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.monitoring.metrics import fetched_one_behind
from flax_transformers.objectives.base import Array, Batch, ModelFunctions, Objective, Params
from flax_transformers.parallel.rules import batch_sharding, check_batch_size, host_rows, place_rows
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import compile_evaluation_step

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
