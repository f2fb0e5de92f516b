"""A model's predictions for held-out examples, each example once, the same on all hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from flax_transformers.monitoring.metrics import fetched_one_behind
from flax_transformers.monitoring.throughput import Sums
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ModelFunctions,
    Objective,
    Params,
    Rngs,
)
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


def once_per_shape(compiled: Callable[[Snapshot], T]) -> Callable[[Snapshot], T]:
    """``compiled``, called for the first snapshot of each mesh and sequence length only."""
    found: dict[tuple[Mesh, int], T] = {}

    def of_shape(snapshot: Snapshot) -> T:
        key = snapshot.mesh, snapshot.phase.sequence_length
        if key not in found:
            found[key] = compiled(snapshot)
        return found[key]

    return of_shape


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

    The model is run once for both, where it reads the batch as it is; elsewhere if the compiler
    finds the two passes to be equal, which it does not on meshes over which parameters are divided.
    """

    def scored_prediction_step(params: Params, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        once = _with_shared_states(functions)
        sums = objective.terms(once, params, batch, {}).metrics
        return sums, _predictions(objective, once, params, batch)

    return scored_prediction_step


def _with_shared_states(functions: ModelFunctions) -> ModelFunctions:
    """``functions`` that compute the hidden states of the same batch once, without dropout."""
    known: list[tuple[Params, Batch, Any]] = []

    def hidden_states(params: Params, batch: Batch, rngs: Rngs) -> Any:
        for known_params, known_batch, states in known:
            if known_params is params and known_batch is batch and not rngs:
                return states
        states = functions.hidden_states(params, batch, rngs)
        if not rngs:
            known.append((params, batch, states))
        return states

    return replace(functions, hidden_states=hidden_states)


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
