"""From random-access examples to batches, the same stream on any number of hosts and workers.

Training reads a pure function of one integer: position i of the global stream is example
``shuffle(i)`` of its epoch, prepared with random numbers keyed by i. So the position is the only
state, every example comes once an epoch (in a mixture, once an epoch of its part), masks are drawn
anew each epoch, and host p of P takes its contiguous rows of each global batch. grain gives the
shuffle, which needs no table (up to 2**32 examples), and the worker processes.

Text and images alike: anything with `Examples` and an objective's ``prepare`` will do.
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
    """One row of the stream: the example's arrays as the objective wants them, and its number."""

    examples: Examples
    objective: Objective
    vocab: Vocabulary
    sequence_length: int
    key: int

    def __call__(self, place: int, number: int) -> dict[str, np.ndarray]:
        """``place`` keys the random numbers, ``number`` is the example."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.key, place], np.uint64)))
        row = self.examples.read(number, rng)
        if not self.examples.is_prepared:
            row = self.objective.prepare(row, rng, self.vocab, self.sequence_length)
        return {**row, "example_id": np.array(number, np.int64)}


def stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class _HostBatches:
    """One host's rows of the global batches from ``first`` on: batch b is element b."""

    prepare: _Prepare
    first: int
    batch_size: int
    rows: np.ndarray
    static_epochs: int | None

    def __len__(self) -> int:
        return 1 << 60  # endless

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        start = self.first + batch * self.batch_size
        positions = (start + int(row) for row in self.rows)
        return stacked([self._row(position) for position in positions])

    def _row(self, position: int) -> dict[str, np.ndarray]:
        examples = self.prepare.examples
        epoch, number = examples.locate(position, self.prepare.key)
        if self.static_epochs is None:
            return self.prepare(position, number)
        return self.prepare(epoch % self.static_epochs * len(examples) + number, number)


def _rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """The row numbers asked for, by default all of a batch."""
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"a batch of {batch_size} rows cannot give rows {rows.tolist()}")
    return rows


class TrainStream(Iterator[dict[str, np.ndarray]]):
    """Endless training batches of one host: arrays [number of its rows, ...].

    ``rows`` are the numbers of the rows of each global batch that this host has to make, by
    default all: row r of a batch is the same for any division of the rows among hosts.

    Besides the objective's arrays a batch holds ``example_id`` int64, the examples' numbers.
    With ``static_epochs`` an example is prepared with the same random numbers again after so many
    epochs, else always with new ones.

    ``position`` counts examples that all hosts together have consumed since the stream began; set
    it (or start with it) and the stream goes on exactly there, whatever hosts, workers and batch
    size were before. ``seed`` tells streams apart: give the phases of a run different ones, e.g.
    (seed, phase). Batches may straddle the border of two epochs. Close it, or leave it as a
    context manager, to end the workers.

    Workers are spawned: the program's main module is imported again, so it needs the usual
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
        """Examples consumed by all hosts together; where the next batch begins."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self.close()
        self._position = position

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._position += self._batches.batch_size
        return batch

    def _open(self) -> Any:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags, also in programs without absl
        batches = replace(self._batches, first=self._position)
        threads = batches.prepare.examples.read_threads
        stream = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if self._workers:
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, _BATCHES_AHEAD),
                worker_init_fn=_start_worker,
            )
        return iter(stream)

    def close(self) -> None:
        """Ends the worker processes; reading on starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> TrainStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_worker(worker: int, workers: int) -> None:
    end_with_parent()


def evaluation_batches(
    examples: Examples,
    objective: Objective,
    vocab: Vocabulary,
    *,
    sequence_length: int,
    batch_size: int,
    seed: Seed,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example exactly once over all hosts, in order; the same rows on every call.

    Batches are as `TrainStream`'s, and as many on every host. Random choices are keyed by the
    example's number alone, so masks stay fixed. Rows that fill the last batch up are all zeros,
    with ``example_id`` -1: an objective has to give a row of zeros the weight 0.
    """
    rows = _rows(rows, batch_size)
    prepare = _Prepare(examples, objective, vocab, sequence_length, key_of("evaluation", seed))
    zeros = {name: np.zeros_like(array) for name, array in prepare(0, 0).items()}
    zeros["example_id"] = np.array(-1, np.int64)
    for first in range(0, len(examples), batch_size):
        watchdog.progress()
        numbers = (first + int(row) for row in rows)
        yield stacked([prepare(n, n) if n < len(examples) else zeros for n in numbers])
