"""What a model predicts of held-out examples, each example once, on all hosts alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.objectives.base import Array, Batch, ModelFunctions, Objective, Params
from flax_transformers.parallel.rules import batch_sharding, check_batch, host_rows, place_rows
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Snapshot
from flax_transformers.training.step import compile_evaluation_step


@runtime_checkable
class Predicts(Objective, Protocol):
    """An objective whose scores take more than sums over places."""

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """What the model says of each row of a batch, and what scores compare it with."""


Predictions = Callable[[Snapshot], Iterator[dict[str, np.ndarray]]]


def held_out_predictions(config: TrainConfig, prepared: PreparedText) -> Predictions:
    """A function that gives what a snapshot predicts of held-out rows, batch by batch.

    The arrays are those of the objective's ``predict`` and ``example_id`` int32 [B]; rows that fill
    the last batch up are left out. Every host gets the rows of all.
    """
    objective = config.objective
    if not isinstance(objective, Predicts):
        raise TypeError(f"{type(objective).__name__} has no predict")
    settings = config.evaluation
    compiled: dict[Any, Callable[..., Any]] = {}  # once for a run

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
        for local in held_out_batches(config, prepared, length, rows):
            local["example_id"] = local["example_id"].astype(np.int32)
            batch = place_rows(local, rows, sharding, settings.batch_size)
            found = jax.device_get(compiled[snapshot.mesh](snapshot.params, batch))
            real = found["example_id"] >= 0
            yield {name: np.asarray(values)[real] for name, values in found.items()}

    return predict
