"""The objective's own metrics on held-out text, each example counted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.pipeline import Examples, evaluation_batches
from flax_transformers.parallel.rules import batch_sharding, check_batch, host_rows, place_rows
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot
from flax_transformers.training.metrics import Accumulator

EVALUATION_SEED = 0
"""Not the run's seed: masks are the same for every run, so their scores compare."""


def held_out_evaluator(config: TrainConfig, prepared: Dataset) -> Evaluator:
    """A function that scores a snapshot on the validation split, as ``{"eval/loss": ...}``.

    Masks are fixed, the last batch is filled up with rows of weight zero, and all processes get
    the same numbers.
    """
    settings = config.evaluation

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        check_batch(settings.batch_size, 1, snapshot.mesh, name="evaluation.batch_size")
        sharding = batch_sharding(snapshot.mesh)
        rows = host_rows(sharding, settings.batch_size)
        length = snapshot.phase.sequence_length
        totals = Accumulator()
        for local in held_out_batches(config, prepared, length, rows):
            local.pop("example_id")
            batch = place_rows(local, rows, sharding, settings.batch_size)
            totals.add(jax.device_get(snapshot.evaluation_step(snapshot.params, batch)))
        return {f"eval/{name}": value for name, value in totals.means().items()}

    return evaluate


def held_out_batches(
    config: TrainConfig, prepared: Dataset, length: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """What evaluation reads, in rows of ``length``; none where nothing is held out.

    ``rows`` are those of each batch that this host makes, by default all; see
    `evaluation_batches`.
    """
    settings = config.evaluation
    examples = prepared.examples("validation", config.objective.window_spec(length))
    if examples is None:
        return
    yield from evaluation_batches(
        _First(examples, settings.max_examples),
        config.objective,
        prepared.vocabulary,
        sequence_length=length,
        batch_size=settings.batch_size,
        rows=rows,
        seed=EVALUATION_SEED,
    )


@dataclasses.dataclass(frozen=True)
class _First:
    """The first ``count`` of ``examples``, or all of them."""

    examples: Examples
    count: int | None

    @property
    def read_threads(self) -> int:
        return self.examples.read_threads

    def __len__(self) -> int:
        return min(len(self.examples), self.count or len(self.examples))

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.examples.read(index, rng)
