"""A model's predictions for held-out examples, each example once, the same on all hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.monitoring.metrics import fetched_one_behind
from flax_transformers.objectives.base import Array, Batch, ModelFunctions, Objective, Params
from flax_transformers.parallel.rules import batch_sharding, check_batch, host_rows, place_rows
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import compile_evaluation_step


@runtime_checkable
class Predicts(Objective, Protocol):
    """An objective whose scores need the predictions of each example, not only sums."""

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """Predictions and references for each row of a batch, arrays [B, ...] by name."""


Predictions = Callable[[Snapshot], Iterator[dict[str, np.ndarray]]]


def held_out_predictions(config: TrainConfig, prepared: PreparedText) -> Predictions:
    """A function of a snapshot that yields its predictions for held-out rows, batch by batch.

    The arrays are those of the objective's ``predict``, and ``example_id`` int32 [B]. Padding rows
    of the last batch are left out. Every host gets the rows of all hosts.
    """
    objective = config.objective
    if not isinstance(objective, Predicts):
        raise TypeError(f"{type(objective).__name__} has no predict")
    settings = config.evaluation
    compiled: dict[Any, Callable[..., Any]] = {}  # by mesh

    def predict(snapshot: Snapshot) -> Iterator[dict[str, np.ndarray]]:
        check_batch(settings.batch_size, 1, snapshot.mesh, name="evaluation.batch_size")
        sharding = batch_sharding(snapshot.mesh)
        rows = host_rows(sharding, settings.batch_size)
        functions = snapshot.functions

        def prediction_step(params: Params, batch: Batch) -> dict[str, Array]:
            found = objective.predict(functions, params, batch)
            return {**found, "example_id": batch["example_id"]}

        if snapshot.mesh not in compiled:
            compiled[snapshot.mesh] = compile_evaluation_step(
                prediction_step, snapshot.params, snapshot.mesh
            )
        length = snapshot.phase.sequence_length

        def dispatch(local: dict[str, np.ndarray]) -> dict[str, Array]:
            local["example_id"] = local["example_id"].astype(np.int32)
            batch = place_rows(local, rows, sharding, settings.batch_size)
            return compiled[snapshot.mesh](snapshot.params, batch)

        batches = held_out_batches(config, prepared, length, rows)
        for found in fetched_one_behind(map(dispatch, batches)):
            real = found["example_id"] >= 0
            yield {name: np.asarray(values)[real] for name, values in found.items()}

    return predict
