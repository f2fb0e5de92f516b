"""Examples of pairs: which pairs share a training sequence, and their tokens."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.kept_arrays import kept_array, shared_array
from flax_transformers.data.store.files import StoreArray
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.sequence_to_sequence import PairSpec

log = logging.getLogger(__name__)
_OPEN_ROWS = 64  # open rows that are searched for free space; more do not improve the packing
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: its multiples are spread out
_PACKED_AT_ONCE = 1 << 18  # pairs, as Python integers
_INDEX = np.dtype("<i8")
_HASH = 4  # entries for the sha256
_UNLIMITED = 1 << 62


class PairExamples(Examples):
    """Packed pairs of one split, in the form of `SequenceToSequence.prepare`.

    The packing is fixed, so that each row is one example and every epoch shuffles the rows.
    ``skipped``: number of pairs that are too long.

    Raises UserError for a store without pairs, and if no pair fits.
    """

    def __init__(self, store: TokenStore, spec: PairSpec) -> None:
        self.store, self.spec = store, spec
        self.read_threads = store.read_threads
        lengths = spec.length, _UNLIMITED if spec.target_length is None else spec.target_length
        self._limits = lengths[0] - spec.overhead, lengths[1] - spec.overhead
        shown = " and ".join(str(length) for length in lengths if length != _UNLIMITED)
        if min(self._limits) < 1:
            raise UserError(f"Sequences of {shown} tokens have no space for text; use longer ones.")
        self._edges: np.ndarray | None = _edges(store)
        sizes = np.diff(self._edges).reshape(-1, 2)
        fits = (sizes <= self._limits).all(axis=1)
        pairs = np.flatnonzero(fits) if spec.long_pairs == "skip" else np.arange(len(sizes))
        self.skipped = len(sizes) - len(pairs)
        if not fits.all():
            log.warning(
                "%d of %d pairs of %s (%s) are longer than %s tokens and are %s",
                len(sizes) - int(fits.sum()),
                len(sizes),
                store.directory,
                store.split,
                shown,
                "left out" if spec.long_pairs == "skip" else "cut",
            )
        if not len(pairs):
            raise UserError(
                f"None of the {len(sizes)} pairs of {store.directory} fits into {shown} tokens; "
                "use longer sequences, or set objective.long_pairs to cut."
            )
        self._packed = len(pairs)
        # Pairs in the order of the rows, the end of each row in them, and their hash.
        self._rows: np.ndarray | StoreArray
        if spec.cross_documents:
            self._rows = kept_array(
                store, self._name, _INDEX, lambda: self._packing(pairs, sizes), _is_intact
            )
        else:
            self._rows = np.concatenate([*self._packing(pairs, sizes)])

    def _packing(self, pairs: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
        """The rows of ``pairs``, and their hash; ``sizes`` int64 [all pairs, 2]."""
        order, ends = np.arange(len(pairs)), np.arange(1, len(pairs) + 1)
        if self.spec.cross_documents:
            needed = np.minimum(sizes[pairs], self._limits) + self.spec.overhead
            first, second = (limit + self.spec.overhead for limit in self._limits)
            order, ends = pack(needed, (first, second))
        rows = np.concatenate([pairs[order], ends])
        yield from (rows, _hash(rows))

    @property
    def documents(self) -> np.ndarray:
        """The pairs: int64 [n]."""
        return np.sort(self._rows[0 : self._packed])

    def limited(self, chosen: np.ndarray) -> PairExamples:
        """The pairs with the numbers ``chosen`` in `documents`, packed."""
        pairs, found = self.documents[chosen], copy.copy(self)
        found._packed = len(pairs)
        sizes = np.diff(_edges(self.store)).reshape(-1, 2)
        found._rows = np.concatenate([*self._packing(pairs, sizes)])
        return found

    @property
    def _name(self) -> str:
        """The file of the packing."""
        spec = self.spec
        settings = f"{spec.length}-{spec.target_length}-{spec.overhead}-{spec.long_pairs}"
        return f"packings/{settings}-{self.store.fingerprint[:16]}"

    def __getstate__(self) -> dict[str, Any]:
        """Of a packing in a file only the length: the file is opened again."""
        kept = isinstance(self._rows, StoreArray)
        rows = len(self._rows) if kept else self._rows
        return {**self.__dict__, "_edges": None, "_rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["_rows"], int):
            found = shared_array(self.store, self._name, _INDEX, state["_rows"])
            self._rows = PairExamples(self.store, self.spec)._rows if found is None else found

    def __len__(self) -> int:
        return len(self._rows) - self._packed - _HASH

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self._edges is None:
            self._edges = _edges(self.store)
        first = int(self._rows[self._packed + index - 1]) if index else 0
        end = int(self._rows[self._packed + index])
        sides: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for pair in self._rows[first:end].tolist():
            for side, limit in enumerate(self._limits):
                start, end = self._edges[2 * pair + side : 2 * pair + side + 2].tolist()
                sides[side].append(self.store.tokens(start, min(end - start, limit)))
        return {
            "source_tokens": np.concatenate(sides[0]),
            "source_ends": np.cumsum([len(text) for text in sides[0]], dtype=np.int32),
            "target_tokens": np.concatenate(sides[1]),
            "target_ends": np.cumsum([len(text) for text in sides[1]], dtype=np.int32),
        }


def _edges(store: TokenStore) -> np.ndarray:
    """Ends of all texts, alternating source and target, from 0: int64 [2 pairs + 1]."""
    edges = np.concatenate([np.zeros(1, np.int64), store.sentence_ends])
    if store.num_sentences != 2 * store.num_documents or (edges[2::2] != store.document_ends).any():
        raise UserError(
            f"The token store in {store.directory} contains texts and not pairs; set data.source "
            "to a PairSource, or choose another objective."
        )
    return edges


def _hash(rows: np.ndarray) -> np.ndarray:
    """sha256 of an int64 array, as int64 [4]."""
    return np.frombuffer(hashlib.sha256(rows.data).digest(), _INDEX)


def _is_intact(kept: StoreArray) -> bool:
    whole = kept.read(0, len(kept))
    return np.array_equal(_hash(whole[:-_HASH]), whole[-_HASH:])


def pack(lengths: np.ndarray, limit: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Packs pairs into rows by first fit over the last open rows, on both sides.

    ``lengths`` int [pairs, 2], each at most ``limit``. Returns the pairs in the order of the rows,
    int64 [pairs], and the end of each row in it, int64 [rows]. Pairs are packed in a fixed order in
    which neighbours are far apart.
    """
    order = np.argsort(np.arange(len(lengths), dtype=np.uint64) * _SPREAD, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    left_a, left_b, row_in = [0] * _OPEN_ROWS, [0] * _OPEN_ROWS, [-1] * _OPEN_ROWS
    begun = 0
    for start in range(0, len(order), _PACKED_AT_ONCE):
        pairs, found = order[start : start + _PACKED_AT_ONCE], []
        for a, b in lengths[pairs].tolist():
            for place in range(_OPEN_ROWS):  # Python integers are faster than numpy for so few
                if left_a[place] >= a and left_b[place] >= b:
                    break
            else:
                place = begun % _OPEN_ROWS  # the oldest row is closed
                left_a[place], left_b[place] = limit
                row_in[place] = begun
                begun += 1
            left_a[place] -= a
            left_b[place] -= b
            found.append(row_in[place])
        rows[pairs] = found
    return np.argsort(rows, kind="stable"), np.cumsum(np.bincount(rows, minlength=begun))
