"""Labelled texts: one text or two, and a class or a number that has to be learned of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from flax_transformers.data.documents import (
    Decoder,
    Document,
    Invalid,
    LabelKind,
    Source,
    Where,
    listed,
)
from flax_transformers.data.files import corpus_files, ending, open_file, reading
from flax_transformers.data.parquet_file import ParquetFile
from flax_transformers.data.records import (
    LineFile,
    Part,
    Record,
    Records,
    TableFile,
    ValueFile,
)
from flax_transformers.data.tfds_data import PREFIX, Examples, tfds_text
from flax_transformers.errors import UserError

ENDINGS = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet",
)  # fmt: skip


@dataclass(frozen=True)
class LabelledSource(Source):
    """A corpus of labelled texts; goes where a `TextSource` goes (``TextData.source``).

    ``path``: a file, a folder or a glob of jsonl, json (an object a line, one list of rows, or one
    object that holds a list of rows for each split), csv, tsv (no quotes) and parquet files, all
    but the last also with .gz; or "tfds:..." as for text.
    ``split``: of TFDS, or of a json file that names its splits.
    ``text_field``, ``second_field``, ``label_field``: JSON keys ("a.b" reaches into an object),
    parquet columns, TFDS features, or names in the first row of csv and tsv. Where all are
    numbers, columns from 0 of csv and tsv files without such a row, or places in rows that are
    JSON lists. ``second_field`` None: one text.
    ``label``: the name of a class (whole numbers are names too), or a number to come near to.
    ``label_names``: the classes in the order of their numbers; by default those of the training
    documents, sorted.

    A row without a label, or with one text of two, is not valid; neither is one of a class that is
    not among the names.
    """

    text_field: str = "text"
    second_field: str | None = None
    label_field: str = "label"
    label: Literal["class", "number"] = "class"
    label_names: tuple[str, ...] = ()

    @property
    def texts(self) -> int:
        return 1 if self.second_field is None else 2

    @property
    def label_kind(self) -> LabelKind:
        return "classes" if self.label == "class" else "numbers"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the texts, and that of the label last."""
        second = () if self.second_field is None else (self.second_field,)
        return (self.text_field, *second, self.label_field)

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order."""
        return corpus_files(self.path, ENDINGS)


_BEGIN = 1 << 12  # bytes that tell a list of rows from rows
Row = Mapping[str, Any] | Sequence[Any]


def labelled_parts(source: LabelledSource) -> Iterator[Part]:
    """The parts of a corpus of labelled texts, in order."""
    if source.path.startswith(PREFIX):
        examples = Examples(source, source.fields)
        yield Part(examples, partial(_example, source, examples))
        return
    for _, path in source.files():
        yield _file_part(path, source)


def _file_part(path: Path, source: LabelledSource) -> Part:
    kind = ending(path, ENDINGS)
    if kind == ".parquet":
        table = ParquetFile(path, source.fields[:-1], source.fields[-1:])
        return Part(table, partial(_cells, source))
    if kind in (".csv", ".tsv"):
        names = not all(field.isdigit() for field in source.fields)
        delimiter = "," if kind == ".csv" else "\t"
        return Part(TableFile(path, delimiter, kind == ".csv", names), partial(_row, source))
    if kind == ".json":
        return Part(_JsonFile(path, source), partial(_json, source))
    return Part(LineFile(path), partial(_json, source))


@dataclass(frozen=True)
class _JsonFile:
    """A record is a line, or a row of the one value that the file holds."""

    path: Path
    source: LabelledSource

    @cached_property
    def _records(self) -> Records:
        lines, value = LineFile(self.path), ValueFile(self.path, partial(_json_rows, self.source))
        with reading(self.path), open_file(self.path) as stream:
            begin = stream.read(_BEGIN).removeprefix(b"\xef\xbb\xbf").lstrip()
        if begin.startswith(b"["):
            return value
        first = next(lines.read(0, None), None)
        return lines if first is None or _is_row(first.content) else value

    @property
    def size(self) -> int:
        return LineFile(self.path).size

    def solid(self, position: int) -> tuple[int, int]:
        return self._records.solid(position)

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        return self._records.read(start, stop)


def _json_rows(source: LabelledSource, path: Path) -> Sequence[Row]:
    """The rows of a file that is one JSON value."""
    with reading(path), open_file(path) as stream:
        raw = stream.read()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is neither one JSON value nor one on each line ({error}); fix the file."
        ) from error
    if isinstance(value, dict) and source.split not in value:
        raise UserError(
            f"{path} has no split {source.split!r}, it has {listed(value)}; set the source's split."
        )
    rows = value[source.split] if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a JSON {type(rows).__name__}, not a list of rows.")
    return rows


def _is_row(line: bytes) -> bool:
    """Whether the first line of a file is a row of its own, and not the file's beginning or whole:
    what holds splits holds nothing but lists."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not all(isinstance(rows, list) for rows in value.values())


def _example(
    source: LabelledSource, examples: Examples, decoder: Decoder, row: dict[str, Any], where: Where
) -> Document:
    cells = [tfds_text(row, field, source) for field in source.fields[:-1]]
    label = row[source.label_field]
    names = getattr(examples.builder.info.features[source.label_field], "names", None)
    if names is not None:
        label = names[int(label)] if label >= 0 else None  # -1: not labelled
    elif isinstance(label, bytes):
        label = label.decode(errors="replace")
    else:
        label = label.item()
    return _cells(source, decoder, [*cells, label], where)


def _json(source: LabelledSource, decoder: Decoder, content: Any, where: Where) -> Document:
    row = decoder.json_row(content, where) if isinstance(content, bytes) else content
    return _row(source, decoder, row, where)


def _row(source: LabelledSource, decoder: Decoder, row: Row, where: Where) -> Document:
    """A row by name or, where it is a list, by place."""
    if not isinstance(row, dict):
        if not isinstance(row, list):
            raise Invalid(where, f"holds a {type(row).__name__}, not a row")
        row = {str(place): value for place, value in enumerate(row)}
    texts = [decoder.field(row, field, where) or "" for field in source.fields[:-1]]
    value: Any = row
    keys = [source.label_field] if source.label_field in row else source.label_field.split(".")
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise Invalid(where, f"has no field {source.label_field!r}, it has {listed(row)}")
        value = value[key]
    return _document(texts, value, source, where)


def _cells(
    source: LabelledSource, decoder: Decoder, cells: Sequence[Any], where: Where
) -> Document:
    """The bytes of the texts, and a label behind them."""
    *raws, label = cells
    texts = [decoder.text(raw or b"", where) for raw in raws]
    if isinstance(label, bytes):
        label = decoder.text(label, where)
    return _document(texts, label, source, where)


def _document(texts: Sequence[str], label: Any, source: LabelledSource, where: Where) -> Document:
    sides = tuple(text.strip() for text in texts)
    if any(sides) and not all(sides):
        raise Invalid(where, "has one text of two")
    if source.label == "number":
        return Document(sides, (_number(label, where),))
    return Document(sides, (class_name(label, where),))


def class_name(label: Any, where: Where) -> str:
    """The name of a class as the store keeps it. Raises `Invalid` for what is none."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):  # tables write whole numbers so where a label is missing
        label = int(label) if label.is_integer() else label if math.isfinite(label) else None
    name = str(label).strip() if isinstance(label, (str, int, float)) else ""
    if not name or not name.isprintable():
        raise Invalid(where, f"has no label: {label!r} is not the name of a class")
    return name


def _number(label: Any, where: Where) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Invalid(where, f"has no label: {label!r} is not a number")
    return number
