"""A model's predictions for held-out examples, each example once, the same on all hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from flax_transformers.monitoring.metrics import fetched_one_behind
from flax_transformers.monitoring.throughput import Sums
from flax_transformers.objectives.base import Array, Batch, ModelFunctions, Objective, Params
from flax_transformers.parallel.distributed import compiled_together
from flax_transformers.parallel.rules import batch_sharding, check_batch_size, host_rows, place_rows
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.step import compile_evaluation_step

T = TypeVar("T")


@runtime_checkable
class Predicts(Objective, Protocol):
    """An objective whose scores need the predictions of each example, not only sums."""

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """Predictions and references for each row of a batch, arrays [B, ...] by name."""


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
        return _predictions(objective, functions, params, batch)

    return compiled_together(compile_evaluation_step(prediction_step, params, mesh))


def scored_prediction_step(
    objective: Predicts, functions: ModelFunctions
) -> Callable[[Params, Batch], tuple[Sums, dict[str, Array]]]:
    """The metric sums of an objective and its predictions, not yet compiled.

    One program, so that the compiler runs the model once for both.
    """

    def scored_prediction_step(params: Params, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        sums = objective.terms(functions, params, batch, {}).metrics
        return sums, _predictions(objective, functions, params, batch)

    return scored_prediction_step


def _predictions(
    objective: Predicts, functions: ModelFunctions, params: Params, batch: Batch
) -> dict[str, Array]:
    found = objective.predict(functions, params, batch)
    return {**found, "example_id": batch["example_id"]}


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

    yield from map(without_padding, fetched_one_behind(map(dispatch, batches)))


def without_padding(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The predictions of a batch without rows whose ``example_id`` is negative."""
    real = found["example_id"] >= 0
    return {name: np.asarray(values)[real] for name, values in found.items()}
