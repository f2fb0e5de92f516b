"""From random-access examples to batches, the same stream on any number of hosts and workers.

Training reads a pure function of one integer: position i of the global stream is example
``shuffle(i)`` of its epoch, prepared with random numbers keyed by i. So the position is the only
state, every example comes once an epoch, masks are drawn anew each epoch, and host p of P takes
its contiguous rows of each global batch. Built on grain's MapDataset, which shuffles without a
table (up to 2**32 examples), and on its worker processes.

Text and images alike: anything with `Examples` and an objective's ``prepare`` will do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from flax_transformers.data.processes import end_with_parent
from flax_transformers.data.store import TokenStore
from flax_transformers.data.windows import cached_window_index
from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import Objective, Vocabulary, WindowSpec

Seed = int | tuple[int | str, ...]
_BATCHES_AHEAD = 2  # per worker process
_BUCKET_THREADS = 16  # reads in flight per process, where a read waits for the network


class Examples(Protocol):
    """Raw examples at random. Picklable, and quick to pickle: workers receive a copy."""

    read_threads: int
    """Threads per process that hide the latency of reads; 0 where reads are quick, as threads
    slow Python code down."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """What the objective's ``prepare`` takes."""


class TextExamples:
    """The windows of one split as raw examples.

    ``[i]`` gives ``tokens`` int32 [n] and ``document_ends`` int32 [k], positions in (0, n] after
    which a document ends. Raises UserError for a training split that does not fill one window
    across documents; a smaller validation split gives one short window.
    """

    def __init__(self, store: TokenStore, spec: WindowSpec) -> None:
        self.store, self.spec = store, spec
        self.read_threads = 0 if store.is_local else _BUCKET_THREADS
        self._windows = cached_window_index(store, spec)
        if store.split == "train" and spec.cross_documents and len(self._windows) == 1:
            separators = store.num_documents - 1
            if store.num_tokens + separators < spec.length:
                raise UserError(
                    f"The corpus has {store.num_tokens} tokens in {store.num_documents} "
                    f"documents, one training window needs {spec.length}; use more text or "
                    "shorter sequences."
                )

    def __getstate__(self) -> dict[str, Any]:
        mapped = isinstance(self._windows, np.memmap)  # open the file again instead of copying it
        return {**self.__dict__, "_windows": None if mapped else self._windows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._windows is None:
            self._windows = cached_window_index(self.store, self.spec)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        window = self._windows[index]
        start, length = int(window["start"]), int(window["length"])
        ends = self.store.document_ends_within(start, start + length) - start
        return {
            "tokens": self.store.tokens(start, length),
            "document_ends": ends.astype(np.int32),
        }


@dataclass(frozen=True)
class _Prepare:
    """One row of the stream: the example's arrays as the objective wants them, and its number."""

    examples: Examples
    objective: Objective
    vocab: Vocabulary
    sequence_length: int
    key: int

    def __call__(self, position: int, number: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.key, position], np.uint64)))
        example = self.examples[number]
        row = self.objective.prepare(example, rng, self.vocab, self.sequence_length)
        return {**row, "example_id": np.int64(number)}


def _key(purpose: str, seed: Seed) -> int:
    """64 bits that differ for every purpose and seed."""
    parts = seed if isinstance(seed, tuple) else (seed,)
    digest = hashlib.blake2b(repr((purpose, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _HostRows(grain.MapDataset):
    """This host's rows of the global batches from ``position`` on, in order.

    Row r of batch b is element ``b * rows + r``, with ``rows`` the host's share of a batch. Hosts
    take contiguous rows, so their batches side by side are the global batch for any host count.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        position: int,
        batch_size: int,
        shard_index: int,
        shard_count: int,
    ) -> None:
        super().__init__(parent)
        self._rows = batch_size // shard_count
        self._batch_size = batch_size
        self._first = position + shard_index * self._rows

    def __len__(self) -> int:
        return (sys.maxsize - self._first) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, self._rows)
        return self._parent[self._first + batch * self._batch_size + row]


def _check_batch(batch_size: int, shard_index: int, shard_count: int) -> None:
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(
            f"A batch of {batch_size} examples does not divide among {shard_count} hosts; choose "
            f"a multiple of {shard_count}."
        )
    if not 0 <= shard_index < shard_count:
        raise UserError(f"Host {shard_index} of {shard_count} does not exist; hosts count from 0.")


class TrainStream(Iterator[dict[str, np.ndarray]]):
    """Endless training batches of one host: arrays [batch_size // shard_count, ...].

    Besides the objective's arrays a batch holds ``example_id`` int64, the examples' numbers.
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
        shard_index: int = 0,
        shard_count: int = 1,
        workers: int = 0,
        position: int = 0,
    ) -> None:
        _check_batch(batch_size, shard_index, shard_count)
        if len(examples) == 0:
            raise UserError("There are no training examples; check the data source.")
        key = _key("train", seed)
        prepare = _Prepare(examples, objective, vocab, sequence_length, key)
        self._rows = (
            grain.MapDataset.source(range(len(examples)))
            .shuffle(seed=_key("shuffle", seed) % 2**32)
            .repeat()
            .map_with_index(prepare)
        )
        self._shard = (batch_size, shard_index, shard_count)
        self._threads, self._workers = examples.read_threads, workers
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
        self._position += self._shard[0]
        return batch

    def _open(self) -> Any:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags, also in programs without absl
        batch_size, _, shard_count = self._shard
        rows = _HostRows(self._rows, self._position, *self._shard)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._threads)
        batches = rows.batch(batch_size // shard_count, drop_remainder=True)
        stream = batches.to_iter_dataset(options)
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
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example exactly once over all hosts, in order; the same rows on every call.

    Batches are as `TrainStream`'s, and as many on every host. Random choices are keyed by the
    example's number alone, so masks stay fixed. Rows that fill the last batch up are all zeros,
    with ``example_id`` -1: an objective has to give a row of zeros the weight 0.
    """
    _check_batch(batch_size, shard_index, shard_count)
    prepare = _Prepare(examples, objective, vocab, sequence_length, _key("evaluation", seed))
    rows = batch_size // shard_count
    for first in range(0, len(examples), batch_size):
        start = first + shard_index * rows
        numbers = range(start, min(start + rows, len(examples)))
        found = [prepare(number, number) for number in numbers]
        if len(found) < rows:
            filler = {name: np.zeros_like(array) for name, array in prepare(0, 0).items()}
            filler["example_id"] = np.int64(-1)
            found += [filler] * (rows - len(found))
        yield {name: np.stack([row[name] for row in found]) for name in found[0]}
