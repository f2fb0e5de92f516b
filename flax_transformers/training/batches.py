"""The batches of a phase, on the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flax_transformers.data.base import DataConfig
from flax_transformers.data.dataset import Dataset, training_examples
from flax_transformers.data.pipeline.loader import Seed, TrainStream
from flax_transformers.objectives.base import Objective
from flax_transformers.parallel.rules import batch_sharding, host_rows, place_rows
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.training.check_run import check_batch_values
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.run_state import RunPosition


@contextlib.contextmanager
def batches_on_mesh(
    config: TrainConfig, prepared: Dataset, mesh: Mesh, position: RunPosition
) -> Iterator[Iterator[tuple[dict[str, jax.Array], np.ndarray]]]:
    """Batches from ``position`` on, each with the ids of this process's examples.

    The next batch is prepared and sent to the devices while a step runs.
    """
    phase, sharding = config.phases[position.phase], batch_sharding(mesh)
    rows = host_rows(sharding, phase.batch_size)
    with watchdog.phase("first_batch"):
        stream = training_batches(
            prepared,
            config.objective,
            sequence_length=phase.sequence_length,
            batch_size=phase.batch_size,
            seed=(config.seed, position.phase),
            workers=config.data.workers,
            position=position.examples,
            rows=rows,
            data=config.data,
            subset_seed=config.seed,
        )

    def placed() -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
        ahead, waiting_for = None, "first_batch"
        while True:
            with watchdog.phase(waiting_for):
                local = next(stream)
            waiting_for = "data"
            ids = local.pop("example_id")
            if ahead is None:
                check_batch_values(config, phase, local)
            batch = place_rows(local, rows, sharding, phase.batch_size), ids
            if ahead is not None:
                yield ahead
            ahead = batch

    try:
        yield placed()
    finally:
        stream.close()


def training_batches(
    prepared: Dataset,
    objective: Objective,
    *,
    sequence_length: int,
    batch_size: int,
    seed: Seed = 0,
    workers: int = 0,
    position: int = 0,
    rows: np.ndarray | None = None,
    data: DataConfig | None = None,
    subset_seed: int = 0,
) -> TrainStream:
    """Endless shuffled batches for ``Trainer.step`` and ``Trainer.fit``; see ``TrainStream``.

    ``prepared``: what ``data.dataset.prepare`` returns, or a ``SequenceDataset``. ``position``:
    examples that were consumed before. ``rows``: those of each batch to return, by default all.
    ``data``: says which subset of the examples is trained on, chosen by ``subset_seed``.
    """
    spec = objective.window_spec(sequence_length)
    return TrainStream(
        training_examples(prepared, spec, data, subset_seed),
        objective,
        prepared.vocabulary,
        sequence_length=sequence_length,
        batch_size=batch_size,
        rows=rows,
        seed=seed,
        workers=workers,
        position=position,
        static_epochs=spec.static_epochs,
    )
