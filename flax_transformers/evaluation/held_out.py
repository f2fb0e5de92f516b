"""The objective's own metrics on held-out data, each example counted once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.pipeline.examples import Examples, Subset
from flax_transformers.data.pipeline.loader import ordered_batches
from flax_transformers.errors import UserError
from flax_transformers.evaluation.predictions import without_padding
from flax_transformers.monitoring.metrics import Accumulator, fetched_one_behind
from flax_transformers.objectives.base import Objective, Vocabulary
from flax_transformers.parallel.rules import batch_sharding, check_batch_size, host_rows, place_rows
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig

EVALUATION_SEED = 0
"""Seed of masks in evaluation. It is the same for every run, so that their scores compare."""


Reader = Callable[[Snapshot, Iterator[dict[str, np.ndarray]]], dict[str, float]]
"""Scores of a snapshot, by name, of its predictions for held-out rows, batch by batch.

The arrays are those of the objective's ``predict``, and ``example_id`` int32 [B]. Padding rows of
the last batch are left out. Every host gets the rows of all hosts.
"""


@dataclass(frozen=True)
class Readers:
    """Readers by component (data without components: ""), and what makes the predictions."""

    by_part: Mapping[str, Reader]
    step_of: Callable[[Snapshot], Any]
    """Gives the compiled `scored_prediction_step` of a snapshot."""


def held_out_evaluator(
    config: TrainConfig,
    prepared: Dataset,
    readers: Readers | None = None,
) -> Evaluator:
    """A function that scores a snapshot on the validation split, as ``{"eval/loss": ...}``.

    In a mixture each component is also scored by itself, ``"eval/loss_NAME"``. Masks are fixed, the
    last batch is padded with rows of weight zero, and all processes get the same scores.

    ``readers`` add scores of the predictions, for which data and model are not run again.
    """
    settings, objective = config.evaluation, config.objective
    readers = readers or Readers({}, lambda snapshot: None)
    by_part = readers.by_part

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        check_batch_size(settings.batch_size, 1, snapshot.mesh, name="evaluation.batch_size")
        sharding = batch_sharding(snapshot.mesh)
        rows = host_rows(sharding, settings.batch_size)
        length = snapshot.phase.sequence_length

        def score(local: dict[str, np.ndarray]) -> Any:
            local.pop("example_id")
            batch = place_rows(local, rows, sharding, settings.batch_size)
            return snapshot.evaluation_step(snapshot.params, batch), {}

        def score_and_predict(local: dict[str, np.ndarray]) -> Any:
            local["example_id"] = local["example_id"].astype(np.int32)
            batch = place_rows(local, rows, sharding, settings.batch_size)
            return readers.step_of(snapshot)(snapshot.params, batch)

        def predictions(part: str, examples: Examples, totals: Accumulator) -> Iterator[Any]:
            step = score_and_predict if part in by_part else score
            batches = scored_batches(config, examples, objective, prepared.vocabulary, length, rows)
            for sums, predicted in fetched_one_behind(map(step, batches)):
                totals.add(sums)
                whole.add(sums)
                yield predicted

        whole = Accumulator()
        found: dict[str, float] = {}
        for part, examples in _held_out_parts(objective, prepared, length):
            totals = Accumulator()
            rest = predictions(part, examples, totals)
            read = by_part[part](snapshot, map(without_padding, rest)) if part in by_part else {}
            for _ in rest:  # the metrics need all batches, also those that a reader left
                pass
            if part:
                found |= {f"eval/{name}_{part}": mean for name, mean in totals.means().items()}
            found |= {of_component(name, part): score for name, score in read.items()}
        return {f"eval/{name}": mean for name, mean in whole.means().items()} | found

    return evaluate


def of_component(metric: str, name: str) -> str:
    """The name of a metric of a component, which data without components do not have."""
    return f"{metric}_{name}" if name else metric


def evaluation_batches(
    prepared: Dataset,
    objective: Objective,
    *,
    sequence_length: int,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Each held-out example once, in order, for ``Trainer.evaluate``; see `ordered_batches`.

    ``prepared`` and ``rows`` are as in `training_batches`. Masks are those of the evaluation of a
    run. Raises UserError if nothing is held out.
    """
    parts = dict(_held_out_parts(objective, prepared, sequence_length))
    if not parts:
        raise UserError(
            f"{prepared.directory} has no held-out examples; give a SequenceDataset validation=, "
            "or set data.validation_source"
        )
    return itertools.chain.from_iterable(
        ordered_batches(
            examples,
            objective,
            prepared.vocabulary,
            sequence_length=sequence_length,
            batch_size=batch_size,
            rows=rows,
            seed=EVALUATION_SEED,
        )
        for examples in parts.values()
    )


def held_out_batches(
    config: TrainConfig, prepared: Dataset, length: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of evaluation, in rows of ``length``; none if nothing is held out.

    ``rows`` are those of each batch that this host makes, by default all; see
    `ordered_batches`. No batch holds examples of two components of a mixture.
    """
    for _, examples in _held_out_parts(config.objective, prepared, length):
        objective, vocabulary = config.objective, prepared.vocabulary
        yield from scored_batches(config, examples, objective, vocabulary, length, rows)


def _held_out_parts(
    objective: Objective, prepared: Dataset, length: int
) -> Iterator[tuple[str, Examples]]:
    """The held-out examples of each component of a mixture by name; other data under ""."""
    examples = prepared.examples("validation", objective.window_spec(length))
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
    batches = ordered_batches(
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
