"""Batches of examples: the same stream for any number of hosts and workers.

The training stream is a pure function of the position: position i of the global stream is example
``shuffle(i)`` of its epoch, prepared with random numbers keyed by i. So the position is the only
state, every example is read once per epoch (in a mixture, per epoch of its part), masks change each
epoch, and each host reads its own rows of each global batch. grain provides the shuffle, which
needs no table (up to 2**32 examples), and the worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from absl import flags

from flax_transformers.data.pipeline.examples import Examples, Seed, key_of
from flax_transformers.data.pipeline.processes import end_with_parent
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Objective, Vocabulary
from flax_transformers.parallel.watchdog import watchdog

_BATCHES_AHEAD = 2  # per worker process


@dataclass(frozen=True)
class _Prepare:
    """Prepares one row of the stream: the objective's arrays, and the index of the example."""

    examples: Examples
    objective: Objective
    vocab: Vocabulary
    sequence_length: int
    key: int

    def __call__(self, position: int, number: int) -> dict[str, np.ndarray]:
        """``position``: key of the random numbers; ``number``: index of the example."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.key, position], np.uint64)))
        row = self.examples.read(number, rng)
        if not self.examples.is_prepared:
            row = self.objective.prepare(row, rng, self.vocab, self.sequence_length)
        return {**row, "example_id": np.array(number, np.int64)}


def stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class _HostBatches:
    """One host's rows of the global batches from position ``first``: element b is batch b."""

    prepare: _Prepare
    first: int
    batch_size: int
    rows: np.ndarray
    static_epochs: int | None

    def __len__(self) -> int:
        return 1 << 60  # endless

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        start = self.first + batch * self.batch_size
        return stacked([self._row(start + int(row)) for row in self.rows])

    def _row(self, position: int) -> dict[str, np.ndarray]:
        examples = self.prepare.examples
        epoch, number = examples.locate(position, self.prepare.key)
        if self.static_epochs is None:
            return self.prepare(position, number)
        return self.prepare(epoch % self.static_epochs * len(examples) + number, number)


def _rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """The given row indices, or all of a batch."""
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"a batch of {batch_size} rows has no rows {rows.tolist()}")
    return rows


class TrainStream(Iterator[dict[str, np.ndarray]]):
    """Endless training batches of one host: arrays [number of its rows, ...].

    ``rows``: the rows of each global batch that this host makes, default all. Row r of a batch is
    the same for any division of the rows among hosts.

    A batch contains the objective's arrays and ``example_id`` int64, the indices of the examples.
    With ``static_epochs``, the random numbers of an example repeat after so many epochs.

    ``position``: number of examples that all hosts have consumed since the start of the stream. If
    it is set, the stream resumes exactly there, for any number of hosts, workers and any batch
    size. ``seed``: use different seeds for the phases of a run, such as (seed, phase). A batch may
    contain examples of two epochs. Close it, or use it as a context manager, to end the workers.

    Workers are spawned: the program's main module is imported again, so it needs
    ``if __name__ == "__main__"``, and objective and examples must be importable and picklable.
    """

    def __init__(
        self,
        examples: Examples,
        objective: Objective,
        vocab: Vocabulary,
        *,
        sequence_length: int,
        batch_size: int,
        seed: Seed,
        rows: np.ndarray | None = None,
        workers: int = 0,
        position: int = 0,
        static_epochs: int | None = None,
    ) -> None:
        if len(examples) == 0:
            raise UserError("There are no training examples; check the data source.")
        prepare = _Prepare(examples, objective, vocab, sequence_length, key_of("train", seed))
        rows = _rows(rows, batch_size)
        self._batches = _HostBatches(prepare, position, batch_size, rows, static_epochs)
        self._workers = workers
        self._iterator: Any = None
        self._position = position

    @property
    def position(self) -> int:
        """Number of examples consumed by all hosts; the start of the next batch."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self.close()
        self._position = position

    def __next__(self) -> dict[str, np.ndarray]:
        self._iterator = self._iterator or self._open()
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # what grain says
                raise
            raise UserError(
                f"a data {str(error).partition('.')[0].lower()}; give the job more memory, or "
                "/dev/shm more space (docker run --shm-size), or lower data.workers"
            ) from error
        self._position += self._batches.batch_size
        return batch

    def _open(self) -> Any:
        batches = replace(self._batches, first=self._position)
        stream = _read_ahead(batches, batches.prepare.examples.read_threads)
        if self._workers:
            options = grain.MultiprocessingOptions(self._workers, _BATCHES_AHEAD)
            stream = stream.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(stream)

    def close(self) -> None:
        """Ends the worker processes; they start again when the next batch is read."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> TrainStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_worker(worker: int, workers: int) -> None:
    end_with_parent()


def _read_ahead(batches: Any, threads: int) -> grain.IterDataset:
    """``batches`` in order, prepared by ``threads`` threads ahead of their use."""
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return grain.MapDataset.source(batches).to_iter_dataset(options)


@dataclass(frozen=True)
class _EvaluationBatches:
    """One host's rows of the evaluation batches: element b is batch b."""

    prepare: _Prepare
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.prepare.examples) // self.batch_size)

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        numbers = [batch * self.batch_size + int(row) for row in self.rows]
        total = len(self.prepare.examples)
        padding = self._padding() if max(numbers) >= total else {}
        return stacked([self.prepare(n, n) if n < total else padding for n in numbers])

    def _padding(self) -> dict[str, np.ndarray]:
        zeros = {name: np.zeros_like(array) for name, array in self.prepare(0, 0).items()}
        return zeros | {"example_id": np.array(-1, np.int64)}


def ordered_batches(
    examples: Examples,
    objective: Objective,
    vocab: Vocabulary,
    *,
    sequence_length: int,
    batch_size: int,
    seed: Seed,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example exactly once over all hosts, in order; equal on every call.

    Batches are as in `TrainStream`, with the same number on every host. Random numbers are keyed by
    the index of the example, so that masks are fixed. The last batch is filled with rows of zeros
    with ``example_id`` -1, which must have the weight 0 in an objective.
    """
    prepare = _Prepare(examples, objective, vocab, sequence_length, key_of("evaluation", seed))
    batches = _EvaluationBatches(prepare, batch_size, _rows(rows, batch_size))
    for batch in _read_ahead(batches, examples.read_threads):
        watchdog.progress()
        yield batch
