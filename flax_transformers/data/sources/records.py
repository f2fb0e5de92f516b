"""Sources of documents, and the records in their files: lines, blocks of lines, rows.

Every record has a position, from 0 to the ``size`` of its file (or other part of a corpus). A
corpus is divided into shards by dividing the range of positions, without reading it. Most files can
be read from any position. A stretch that can only be read from its beginning, as in a compressed
file, is *solid*.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from flax_transformers import ranges
from flax_transformers.data.sources import embedded
from flax_transformers.data.sources.corpus_files import Listing, list_corpus
from flax_transformers.data.sources.documents import (
    LONGEST,
    Decoder,
    Document,
    Invalid,
    LabelKind,
    Where,
    listed,
)
from flax_transformers.data.sources.files import (
    Place,
    Stream,
    cut_lines,
    is_blank_before,
    is_compressed,
    line_start,
    raw_lines,
    reading_source,
)
from flax_transformers.data.sources.splits import keep_split
from flax_transformers.errors import UserError

LATER = {"later": True}
"""Metadata of a field that sources of earlier versions do not have: stores name it only where it is
not the default, so that those of earlier versions are found."""


class Record(NamedTuple):
    """The content of a record, of a type that depends on the file, and where it is.

    ``continues``: whether it is the rest of the record before, which was too long.
    """

    position: int
    content: Any
    where: Where
    continues: bool = False


class Records(Protocol):
    """A file, or another part of a corpus, that is read in order."""

    @property
    def size(self) -> int:
        """Number of positions, known without reading the content."""

    def solid(self, position: int) -> tuple[int, int]:
        """The stretch around a position that can only be read from its beginning.

        (position, position) if reading can start there.
        """

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        """The records with positions in [start, stop), in order; None: to the end."""


@dataclass(frozen=True)
class Part:
    """Records, and the function that parses each into a document; it may raise `Invalid`."""

    records: Records
    parse: Callable[[Decoder, Any, Any], Document]


@dataclass(frozen=True)
class Source:
    """A corpus, described by plain values; each kind of source adds the fields it needs.

    ``path``: a file, a folder (all files below it with a known ending, sorted), a glob,
    "tfds:NAME[/CONFIG][:VERSION]", or "tfds:/folder/of/a/prepared/builder".
    ``split``: of files that are named by splits as on the Hugging Face hub (``test.jsonl``,
    ``test-00000-of-00001.parquet``, ``test/...``), those that are read; files that are not so named
    are all "train". One file is read whole, unless it is a json file with splits inside. For TFDS,
    slices such as "train[:10%]" included.
    ``on_invalid``: what happens to invalid documents: "error" stops with file and line, "skip"
    leaves the document out, "replace" puts U+FFFD for invalid bytes and leaves out other invalid
    documents.
    """

    path: str = "embedded"
    split: str = "train"
    on_invalid: Literal["error", "skip", "replace"] = "error"

    endings: ClassVar[tuple[str, ...]] = ()
    """Endings of the files that are read, without those of compressed files."""
    splits_in_json: ClassVar[bool] = True
    """Whether a json file may contain several splits."""
    store_version: ClassVar[int] = 1
    """Of what stores hold of its documents; raised where this is corrected. New runs then get a new
    store, and those that have one keep it."""

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.source")

    @property
    def label_kind(self) -> LabelKind | None:
        """The kind of labels that its documents have besides their text."""
        return None

    @property
    def known_classes(self) -> tuple[str, ...]:
        """The classes in the order of their numbers; empty where only the documents name them."""
        names: tuple[str, ...] = getattr(self, "label_names", ())
        return names

    @property
    def target_kind(self) -> str | None:
        """What is learned from its documents besides their text: "pairs", or the kind of labels."""
        return self.label_kind

    @property
    def texts(self) -> int:
        """Number of separate texts of a labelled document."""
        return 1

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order."""
        return self.listing().files

    def listing(self) -> Listing:
        """The files at ``path`` that are of the split, and what is not read."""
        found = list_corpus(self.path, self.endings)
        return keep_split(found, self.path, self.split, inside=self.splits_in_json)

    def parts(self) -> Iterator[Part]:
        """The parts of the corpus, in order."""
        raise NotImplementedError

    def embedded_texts(self) -> Iterator[str]:
        """The texts of the path "embedded"."""
        return embedded.documents()


@dataclass(frozen=True)
class _File:
    path: Path

    @cached_property
    def size(self) -> int:
        with reading_source(self.path):
            return self.path.stat().st_size

    def solid(self, position: int) -> tuple[int, int]:
        return (0, self.size) if is_compressed(self.path) else (position, position)


@dataclass(frozen=True)
class LineFile(_File):
    """A record is a non-empty line: bytes, at a `Place`."""

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        path = self.path
        with reading_source(path), Stream(path) as stream:
            first = 0 if is_compressed(path) else line_start(stream.file, start, stop)
            if first is None:
                return
            for offset, raw in raw_lines(stream.file, first):
                position = stream.position(offset)
                if stop is not None and position >= stop:
                    return
                if position >= start and not raw.isspace():
                    yield Record(position, raw, Place(path, offset))


@dataclass(frozen=True)
class TextFile(_File):
    """A record is a line, a block of lines between empty ones, or the whole file: bytes, at a
    `Place`.

    A record longer than LONGEST is cut, between lines or at spaces, into several with the position
    of the first; unless ``cut``, it stays too long and is invalid.
    """

    divided: str
    cut: bool = True

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        with reading_source(self.path), Stream(self.path) as stream:
            if is_compressed(self.path) or start == 0:
                yield from self._blocks(stream, 0, True, start, stop)
            elif self.divided != "file":
                first = line_start(stream.file, start, stop)
                if first is not None:
                    begins = self.divided == "line" or is_blank_before(stream.file, first)
                    yield from self._blocks(stream, first, begins, start, stop)

    def _blocks(
        self, stream: Stream, offset: int, begins: bool, start: int, stop: int | None
    ) -> Iterator[Record]:
        """Reads from the line at ``offset``, where a record ``begins`` or continues."""
        block: list[bytes] = []
        size = first = position = 0
        ours = False  # whether the current record is in [start, stop)
        at_line, continues = True, False
        for piece, ends_line in cut_lines(stream.file):
            empty = self.divided == "blank_line" and at_line and ends_line and piece.isspace()
            begins = at_line and not empty and (begins or self.divided == "line")
            if block and (empty or begins or (self.cut and size + len(piece) > LONGEST)):
                yield Record(position, b"".join(block), Place(self.path, first), continues)
                continues = not (empty or begins)
                block, size = [], 0
            if begins:
                position = stream.position(offset) if self.divided != "file" else 0
                ours = position >= start
                if stop is not None and position >= stop:
                    return
            elif not ours and stop is not None and stream.position(offset) >= stop:
                return
            if not empty and ours and size <= LONGEST:
                first = first if block else offset
                block.append(piece)
                size += len(piece)
            begins, at_line = empty, ends_line
            offset += len(piece)
        if block:
            yield Record(position, b"".join(block), Place(self.path, first), continues)


@dataclass(frozen=True)
class TwoFiles(_File):
    """A record is a line of ``path`` and one of ``other``: a tuple of bytes, at the former's
    position.

    None stands for a missing line. Both files are read from the beginning, to count lines.
    """

    other: Path

    def solid(self, position: int) -> tuple[int, int]:
        return 0, self.size

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        one, other = self.path, self.other
        with _opened(one) as left, _opened(other) as right:
            lines = itertools.zip_longest(_lines(one, left), _lines(other, right))
            for number, (first, second) in enumerate(lines, 1):
                position = max(0, self.size - 1) if first is None else left.position(first[0])
                if stop is not None and position >= stop:
                    return
                if position >= start:
                    raws = first and first[1], second and second[1]
                    yield Record(position, raws, PairOfLines(one, other, number))


def _opened(path: Path) -> Stream:
    with reading_source(path):
        return Stream(path)


def _lines(path: Path, stream: Stream) -> Iterator[tuple[int, bytes]]:
    """The lines of one of two files, whose errors name this one."""
    with reading_source(path):
        yield from raw_lines(stream.file)


@dataclass(frozen=True)
class PairOfLines:
    """Where a record of `TwoFiles` is."""

    path: Path
    other: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class WrongRow:
    """A row of a table that is invalid, and why."""

    problem: str


@dataclass(frozen=True)
class TableFile(_File):
    """A record is a row of a table: a list of cells or, with ``names``, a dict by the names in the
    first row. Raises UserError if the first row lacks one of them or has it twice.

    A row with more cells than the first one, where some quotes or tabs are wrong, is a `WrongRow`;
    further empty cells do not count. Bytes that are not UTF-8 become surrogates, as with
    errors="surrogateescape". A row with ``quoted`` cells may have several lines, so the file is
    read from its beginning.
    """

    delimiter: str
    quoted: bool
    names: tuple[str, ...] = ()

    def solid(self, position: int) -> tuple[int, int]:
        return (0, self.size) if self.quoted else super().solid(position)

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        path = self.path
        with reading_source(path), Stream(path) as stream:
            head: list[str] | None = None
            first: int | None = 0
            if start and self.solid(start) == (start, start):
                head = self._checked(next(filter(None, self._table(_TextLines(stream, 0))), []))
                first = line_start(stream.file, start, stop)
            if first is None:
                return
            lines = _TextLines(stream, first)
            table = self._table(lines)
            while True:
                place = Place(path, lines.upcoming)
                cells = self._row(table, place)
                if cells is None:
                    return
                if not cells:
                    continue
                if head is None:
                    head = self._checked(cells)
                    if self.names:
                        continue
                position = stream.position(place.offset)
                if stop is not None and position >= stop:
                    return
                if position >= start:
                    yield Record(position, self._content(cells, head), place)

    def _content(self, cells: list[str], head: list[str]) -> WrongRow | list[str] | dict[str, str]:
        if any(cells[len(head) :]):
            return WrongRow(f"has {len(cells)} cells, but the first row has {len(head)}")
        return dict(zip(head, cells, strict=False)) if self.names else cells

    def _checked(self, names: list[str]) -> list[str]:
        """The cells of the first row."""
        if not self.names:
            return names
        try:
            Decoder(False).text("".join(names).encode("utf-8", "surrogateescape"), self.path)
        except Invalid as problem:
            raise UserError(f"{problem}; {problem.remedy}.") from problem
        for name in self.names:
            if names.count(name) > 1:
                raise UserError(
                    f"The table {self.path} has several columns {name!r}; rename all but one."
                )
            if name not in names:
                raise UserError(
                    f"The table {self.path} has no column {name!r}, it has {listed(names)}; name "
                    "one of them in the source's fields, or leave the file out."
                )
        return names

    def _table(self, lines: Iterator[str]) -> Iterator[list[str]]:
        csv.field_size_limit(LONGEST)
        if self.quoted:
            return csv.reader(lines, delimiter=self.delimiter, strict=True)
        return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)

    def _row(self, table: Iterator[list[str]], place: Place) -> list[str] | None:
        try:
            return next(table, None)
        except csv.Error as error:
            raise UserError(
                f"{place} is not a row of a table ({error}); fix the file. In cells with quotes "
                "around them, quotes are written twice."
            ) from error


class _TextLines:
    """The lines of a table as text. ``upcoming``: offset of the next line."""

    def __init__(self, stream: Stream, offset: int) -> None:
        self._lines = raw_lines(stream.file, offset)
        self._parts: list[str] = []
        self._start = self._end = offset

    @property
    def upcoming(self) -> int:
        return self._start if self._parts else self._end

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        if not self._parts:
            offset, raw = next(self._lines)
            if len(raw) > LONGEST:
                raise csv.Error(f"longer than {LONGEST >> 20} MiB")
            self._start, self._end = offset, offset + len(raw)
            text = raw.decode("utf-8", "surrogateescape")
            text = text.removeprefix("\ufeff") if offset == 0 else text
            self._parts = [*io.StringIO(text, newline="")][::-1] or [""]  # "\r" ends a line, too
        return self._parts.pop()


@dataclass(frozen=True)
class ValueFile(_File):
    """A record is one of the rows that ``load`` reads; their positions are evenly spaced."""

    load: Callable[[Path], Sequence[Any]]
    name: str = "Row"

    def solid(self, position: int) -> tuple[int, int]:
        return 0, self.size

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        rows = self.load(self.path)
        for number, row in enumerate(rows):
            position = self.size * number // len(rows)
            if position >= start and (stop is None or position < stop):
                yield Record(position, row, f"{self.name} {number} of {self.path}")


@dataclass(frozen=True)
class MemoryTexts:
    """A record is a text in memory."""

    texts: Sequence[str]

    @cached_property
    def starts(self) -> list[int]:
        """The position of each text, and the end."""
        return [0, *itertools.accumulate(map(len, self.texts))]

    @property
    def size(self) -> int:
        return self.starts[-1]

    def solid(self, position: int) -> tuple[int, int]:
        return position, position

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        for number, (position, text) in enumerate(zip(self.starts, self.texts, strict=False)):
            if position >= start and (stop is None or position < stop):
                yield Record(position, text, f"Text {number}")


def too_long(raw: bytes, where: Where) -> None:
    """Raises `Invalid` for a record that is longer than LONGEST."""
    if len(raw) > LONGEST:
        raise Invalid(where, f"is longer than {LONGEST >> 20} MiB")
