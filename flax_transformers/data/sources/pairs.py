"""Pairs of texts, a source and its target: where they come from, and rows of them.

A pair is a document of a token store whose two sentences are the source and the target, so stores
of pairs are made, resumed, checked and read like those of any text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformers.data.sources import row_files
from flax_transformers.data.sources.corpus_files import corpus_files, ending
from flax_transformers.data.sources.documents import Decoder, Document, Invalid, Source, Where
from flax_transformers.data.sources.fields import row_of, text_in
from flax_transformers.data.sources.records import (
    LineFile,
    PairOfLines,
    Part,
    Records,
    TableFile,
    TwoFiles,
)
from flax_transformers.data.sources.row_files import ChosenFile, first_lines, row_file
from flax_transformers.data.sources.tfds import PREFIX, Examples
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.sequence_to_sequence import PairSpec

log = logging.getLogger(__name__)
ENDINGS = row_files.ENDINGS
_OPEN_ROWS = 64  # rows that are looked through for room; more of them pack no tighter
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: multiples of it lie apart
_BUCKET_THREADS = 16


@dataclass(frozen=True)
class PairSource(Source):
    """A corpus of pairs; goes where a `TextSource` goes (``TextData.source``).

    ``path``: a file, a folder or a glob of the formats of records that `LabelledSource` names; or
    "tfds:..." as for text.
    ``split``: of TFDS, or of a json file that names its splits.
    ``source_field``, ``target_field``: named as for a `LabelledSource` ("translation.de" reaches
    into an object). A tsv file whose first line does not name both has no such line: then numbers
    are columns from 0, and with other names its first two are read.
    ``target_path``: the file with the targets, line by line beside the sources in the file
    ``path``; any ending will do, compressed or not.

    Pairs with the same target are held out together: corpora of many languages repeat them.
    A row with one side only is not valid, and one with none is empty; ``on_invalid`` says what
    becomes of those that are not valid ("replace" leaves out what is unpaired).
    """

    source_field: str = "source"
    target_field: str = "target"
    target_path: str | None = None

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order."""
        if self.target_path is None:
            return corpus_files(self.path, ENDINGS)
        found = [Path(path).expanduser() for path in (self.path, self.target_path)]
        for path in found:
            if not path.is_file():
                raise UserError(f"There is no file {path}; check the path.")
        return [(path.name, path) for path in found]


def pair_parts(source: PairSource) -> Iterator[Part]:
    """The parts of a corpus of pairs, in order."""
    fields = source.source_field, source.target_field
    if source.path.startswith(PREFIX):
        yield Part(Examples(source, fields), partial(_row, fields))
    elif source.target_path is not None:
        (_, one), (_, other) = source.files()
        yield Part(TwoFiles(one, other), _parallel_pair)
    else:
        for _, path in source.files():
            if ending(path, ENDINGS) == ".tsv":
                yield Part(
                    ChosenFile(path, partial(_tsv_file, path, fields)), partial(_tsv, fields)
                )
            else:
                yield Part(row_file(path, source.split, fields), partial(_row, fields))


def _pair(one: str, other: str, where: Where) -> Document:
    sides = one.strip(), other.strip()
    if any(sides) and not all(sides):
        raise Invalid(where, f"has no {'target' if sides[0] else 'source'}")
    return Document(sides, group=sides[1])


def _row(fields: tuple[str, str], decoder: Decoder, content: Any, where: Where) -> Document:
    row = row_of(decoder, content, where)
    one, other = (text_in(decoder, row, field, where) for field in fields)
    return _pair(one, other, where)


def _tsv_file(path: Path, fields: tuple[str, str]) -> Records:
    """A record is a row by name, if the first line names both fields; else a line."""
    for line in first_lines(path, 1):
        names = line.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").rstrip("\r\n")
        if set(fields) <= set(names.split("\t")):
            return TableFile(path, "\t", quoted=False, names=fields)
    return LineFile(path)


def _tsv(fields: tuple[str, str], decoder: Decoder, content: Any, where: Where) -> Document:
    if not isinstance(content, bytes):
        return _row(fields, decoder, content, where)
    cells = decoder.text(content, where).rstrip("\r\n").split("\t")
    columns = [int(field) if field.isdecimal() else i for i, field in enumerate(fields)]
    if max(columns) >= len(cells):
        raise Invalid(
            where, f"has {len(cells)} columns, but column {max(columns)} (from 0) is asked for"
        )
    return _pair(cells[columns[0]], cells[columns[1]], where)


def _parallel_pair(
    decoder: Decoder, raws: tuple[bytes | None, bytes | None], where: PairOfLines
) -> Document:
    paths = where.path, where.other
    for raw, path, longer in zip(raws, paths, reversed(paths), strict=True):
        if raw is None:
            raise Invalid(path, f"ends before line {where.line}, which {longer} has")
    one, other = (
        decoder.text(raw or b"", f"{path}:{where.line}").removeprefix(
            "\ufeff" if where.line == 1 else ""
        )
        for raw, path in zip(raws, paths, strict=True)
    )
    return _pair(one, other, where)


class PairExamples:
    """Rows of pairs of one split, in the form that `SequenceToSequence.prepare` describes.

    Which pairs share a row is decided here, once and for all, so that a row is an example like any
    other and every epoch shuffles the rows anew. ``skipped`` pairs are too long for a row.

    Raises UserError for a store without pairs, and rows in which none of them fits.
    """

    def __init__(self, store: TokenStore, spec: PairSpec) -> None:
        self.store, self.spec = store, spec
        self.read_threads = 0 if store.is_local else _BUCKET_THREADS
        self._rooms = spec.length - spec.overhead, spec.target_length - spec.overhead
        if min(self._rooms) < 1:
            raise UserError(
                f"Rows of {spec.length} and {spec.target_length} tokens hold no text; use longer "
                "sequences."
            )
        self._edges: np.ndarray | None = _edges(store)
        lengths = np.diff(self._edges).reshape(-1, 2)
        fits = (lengths <= self._rooms).all(axis=1)
        pairs = np.flatnonzero(fits) if spec.long_pairs == "skip" else np.arange(len(lengths))
        self.skipped = len(lengths) - len(pairs)
        if not fits.all():
            log.warning(
                "%d of %d pairs of %s (%s) are longer than rows of %d and %d tokens and are %s",
                len(lengths) - int(fits.sum()),
                len(lengths),
                store.directory,
                store.split,
                spec.length,
                spec.target_length,
                "left out" if spec.long_pairs == "skip" else "cut",
            )
        if not len(pairs):
            raise UserError(
                f"None of the {len(lengths)} pairs of {store.directory} fits into rows of "
                f"{spec.length} and {spec.target_length} tokens; use longer sequences, or set "
                "objective.long_pairs to cut."
            )
        if spec.cross_documents:
            needed = np.minimum(lengths[pairs], self._rooms) + spec.overhead
            order, self._ends = pack(needed, (spec.length, spec.target_length))
            self._pairs = pairs[order]
        else:
            self._pairs, self._ends = pairs, np.arange(1, len(pairs) + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_edges": None}

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self._edges is None:
            self._edges = _edges(self.store)
        first = self._ends[index - 1] if index else 0
        sides: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for pair in self._pairs[first : self._ends[index]].tolist():
            for side, room in enumerate(self._rooms):
                start, end = self._edges[2 * pair + side : 2 * pair + side + 2].tolist()
                sides[side].append(self.store.tokens(start, min(end - start, room)))
        return {
            "source_tokens": np.concatenate(sides[0]),
            "source_ends": np.cumsum([len(text) for text in sides[0]], dtype=np.int32),
            "target_tokens": np.concatenate(sides[1]),
            "target_ends": np.cumsum([len(text) for text in sides[1]], dtype=np.int32),
        }


def _edges(store: TokenStore) -> np.ndarray:
    """Where texts begin and end, source and target of each pair in turn: int64 [2 pairs + 1]."""
    edges = np.concatenate([np.zeros(1, np.int64), store.sentence_ends])
    if store.num_sentences != 2 * store.num_documents or (edges[2::2] != store.document_ends).any():
        raise UserError(
            f"The token store in {store.directory} holds texts and no pairs of them; set "
            "data.source to a PairSource, or choose another objective."
        )
    return edges


def pack(lengths: np.ndarray, room: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs share a row: first fit over the last rows that were begun, on both sides.

    ``lengths`` int [pairs, 2], each at most ``room``. Gives the pairs in the order of the rows,
    int64 [pairs], and where each row ends in it, int64 [rows]. Pairs are taken in an order in which
    neighbours lie far apart; it is the same on every call.
    """
    order = np.argsort(np.arange(len(lengths), dtype=np.uint64) * _SPREAD, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    left = np.zeros((2, _OPEN_ROWS), np.int64)
    row_in = np.full(_OPEN_ROWS, -1, np.int64)
    begun = 0
    for pair, (a, b) in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = (left[0] >= a) & (left[1] >= b)
        place = int(fits.argmax())
        if not fits[place]:
            place = begun % _OPEN_ROWS  # the row begun first makes room for a new one
            left[:, place] = room
            row_in[place] = begun
            begun += 1
        left[0, place] -= a
        left[1, place] -= b
        rows[pair] = row_in[place]
    return np.argsort(rows, kind="stable"), np.cumsum(np.bincount(rows, minlength=begun))
