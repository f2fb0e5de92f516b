"""Random access to examples, and the order in which a training stream reads them.

The order is a pure function of the position in the stream, so it needs neither state nor a table of
the size of the data.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flax_transformers.errors import UserError

Seed = int | tuple[int | str, ...]
_FEW = 1024
_DRAWN_AT_ONCE = 1 << 20  # random numbers
_CYCLE = 1 << 16  # weights of a mixture are rounded to multiples of 1 / _CYCLE


class Examples(Protocol):
    """Random access to raw examples. Picklable and small, because each worker receives a copy.

    Classes inherit from it for the defaults.
    """

    read_threads: int = 0
    """Threads per process that hide the latency of reads; 0 for fast reads, because threads slow
    Python code down."""

    is_prepared: bool = False
    """Whether examples are rows already, and not passed through the objective's ``prepare``."""

    scored_in_order: bool = False
    """Whether neighbours may be windows of one document that is scored as a whole."""

    def __len__(self) -> int: ...

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The input of the objective's ``prepare``; ``rng`` is the only source of randomness."""
        ...

    def locate(self, position: int, key: int) -> tuple[int, int]:
        """(epoch, index) of the example at a position of the endless stream shuffled by ``key``.

        Each epoch is a permutation of its own.
        """
        return _shuffled(position, len(self), key)

    @property
    def components(self) -> tuple[tuple[str, Examples], ...]:
        """The components of a mixture by name; other examples are one component named ""."""
        return (("", self),)

    def consumed(self, position: int) -> dict[str, int]:
        """Number of examples of each component of a mixture before a position of the stream."""
        return {}

    @property
    def plain(self) -> Examples:
        """The examples without random augmentation."""
        return self

    def limited(self, chosen: np.ndarray) -> Examples:
        """The examples with the indices ``chosen``, int64 [n], or, of packed documents, those
        documents packed; they read no others.

        Raises UserError if each comes with a second one (``WindowSpec.other``)."""
        if getattr(getattr(self, "spec", None), "other", False):
            raise UserError(
                "the objective draws a second text for each from all training data, so that "
                "data.max_training_examples and data.examples_per_class cannot limit it; leave "
                "them out"
            )
        return Subset(self, chosen)

    @property
    def documents(self) -> np.ndarray | None:
        """The document that each example is from, where several are windows of one, or the
        documents that are packed into examples: int64 [n]; None if each example is a document."""
        return None

    @property
    def classes(self) -> np.ndarray | None:
        """The class of each example, integers [n]; None for examples without one class each."""
        return None


def key_of(purpose: str, seed: Seed) -> int:
    """64 bits that depend on purpose and seed."""
    parts = seed if isinstance(seed, tuple) else (seed,)
    digest = hashlib.blake2b(repr((purpose, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _shuffled(position: int, count: int, key: int) -> tuple[int, int]:
    epoch, place = divmod(position, count)
    seed = key_of("shuffle", (key, epoch))
    if count <= _FEW:
        return epoch, int(_permutation(count, seed)[place])
    import grain  # imports jax, which configs and workers of preparation do not need

    number = grain.experimental.index_shuffle(
        place, max_index=count - 1, seed=seed % 2**32, rounds=4
    )
    return epoch, number


@functools.lru_cache(maxsize=64)
def _permutation(count: int, seed: int) -> np.ndarray:
    """For few examples, because grain's shuffle takes milliseconds per index for them."""
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")


@dataclass(frozen=True)
class Subset(Examples):
    """The examples with the indices ``chosen``, int64 [n]."""

    examples: Examples
    chosen: np.ndarray

    @property
    def read_threads(self) -> int:  # type: ignore[override]
        return self.examples.read_threads

    @property
    def is_prepared(self) -> bool:  # type: ignore[override]
        return self.examples.is_prepared

    @property
    def plain(self) -> Examples:
        return Subset(self.examples.plain, self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.examples.read(int(self.chosen[index]), rng)


def subset(
    examples: Examples, count: int | None, per_class: int | None, names: Sequence[str], seed: Seed
) -> Examples:
    """``count`` random documents, or ``per_class`` of each class, with all of their examples.

    ``names``: the classes. A smaller subset of the same ``seed`` is part of a larger one. Raises
    UserError for examples without classes, and a class with fewer examples than asked for.
    """
    documents, key = examples.documents, key_of("subset", seed)
    if per_class is None:
        if documents is None:
            most = len(examples) if count is None else count
            return examples.limited(_smallest(len(examples), most, key))
        kept = np.unique(documents[_order(len(documents), key)], return_index=True)
        first = kept[0][np.argsort(kept[1])][:count]  # documents by their first place in the order
        return examples.limited(np.flatnonzero(np.isin(documents, first)))
    order, classes = _order(len(examples), key), examples.classes
    if classes is None:
        raise UserError(
            "data.examples_per_class is set, but the training data has no classes; set "
            "--data.max-training-examples instead"
        )
    if not names:
        raise UserError(
            "data.examples_per_class is set, but the classes have no names; give label_names"
        )
    chosen = [order[classes[order] == number][:per_class] for number in range(len(names))]
    for name, found in zip(names, chosen, strict=True):
        if len(found) < per_class:
            raise UserError(
                f"data.examples_per_class is {per_class}, but the class {name!r} has {len(found)} "
                "training examples; lower it"
            )
    return examples.limited(np.sort(np.concatenate(chosen)))


def _order(total: int, key: int) -> np.ndarray:
    """The indices of random numbers in rising order: int64 [total]."""
    return np.argsort(np.random.Philox(key=key).random_raw(total))


def _smallest(total: int, count: int, key: int) -> np.ndarray:
    """The first ``count`` indices of `_order`, sorted: int64 [n]. In blocks, because there may be
    billions."""
    random, numbers, indices = np.random.Philox(key=key), np.zeros(0, np.uint64), np.arange(0)
    size = max(count, _DRAWN_AT_ONCE)
    for start in range(0, total, size):
        stop = min(start + size, total)
        numbers = np.append(numbers, random.random_raw(stop - start))
        indices = np.append(indices, np.arange(start, stop))
        kept = np.argpartition(numbers, min(count, len(numbers)) - 1)[:count]
        numbers, indices = numbers[kept], indices[kept]
    return np.sort(indices)


@dataclass(frozen=True)
class MixedExamples(Examples):
    """Several sets of examples as one, drawn with ``weights``.

    Indices run through one part after another. A stream draws in proportion to the weights, rounded
    to 1/65536 but never to zero, and evenly spread: any stretch of the stream contains its share of
    each part up to a few examples. A part that ends starts again in another order.
    """

    names: tuple[str, ...]
    parts: tuple[Examples, ...]
    weights: tuple[float, ...]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of the first example of each part, and the total number of examples."""
        return (0, *itertools.accumulate(len(part) for part in self.parts))

    @functools.cached_property
    def read_threads(self) -> int:  # type: ignore[override]
        return max(part.read_threads for part in self.parts)

    @property
    def components(self) -> tuple[tuple[str, Examples], ...]:
        return tuple(zip(self.names, self.parts, strict=True))

    def __len__(self) -> int:
        return self.starts[-1]

    def part_of(self, index: int) -> int:
        """The part that contains an example."""
        return bisect.bisect_right(self.starts, index) - 1

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        part = self.part_of(index)
        return self.parts[part].read(index - self.starts[part], rng)

    def locate(self, position: int, key: int) -> tuple[int, int]:
        """See `Examples.locate`; each epoch of each part is a permutation of its own."""
        part, place = _place(position, self.weights)
        epoch, index = self.parts[part].locate(place, key_of(f"part {self.names[part]}", key))
        return epoch, self.starts[part] + index

    def consumed(self, position: int) -> dict[str, int]:
        parts, _, counts = _cycle(self.weights)
        cycles, place = divmod(position, _CYCLE)
        within = np.bincount(parts[:place], minlength=len(counts))
        totals = (cycles * counts + within).tolist()
        return dict(zip(self.names, totals, strict=True))


def _place(position: int, weights: tuple[float, ...]) -> tuple[int, int]:
    """(part, number of earlier examples of it) at a position of a mixture's stream."""
    parts, before, counts = _cycle(weights)
    cycles, place = divmod(position, _CYCLE)
    part = int(parts[place])
    return part, cycles * int(counts[part]) + int(before[place])


@functools.lru_cache(maxsize=8)
def _cycle(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of parts that a mixture repeats.

    The part at each position and the number of earlier positions of that part, int64 [_CYCLE]; and
    the number of positions of each part, int64 [parts]. Of the n positions of a part, the j-th is
    near (j + 1/2) / n.
    """
    counts = _whole(np.array(weights) / sum(weights))
    parts = np.repeat(np.arange(len(counts)), counts)
    before = np.arange(_CYCLE) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort((before + 0.5) / counts[parts], kind="stable")
    return parts[order], before[order], counts


def _whole(shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Shares as integers with sum _CYCLE, each at least 1, by largest remainders: int64 [n]."""
    exact = np.asarray(shares) * _CYCLE
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    missing = _CYCLE - int(counts.sum())
    for part in np.argsort(counts - exact, kind="stable")[: max(0, missing)]:
        counts[part] += 1
    while counts.sum() > _CYCLE:  # if many shares were rounded up to 1
        counts[counts.argmax()] -= 1
    return counts
