"""Labelled texts: one text or two, and a class or a number that has to be learned of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flax_transformers.data.documents import (
    LONGEST,
    Decoder,
    Document,
    DocumentOf,
    Invalid,
    LabelKind,
    Source,
    listed,
)
from flax_transformers.data.files import (
    corpus_files,
    ending,
    lines,
    open_file,
    parquet_rows,
    reading,
)
from flax_transformers.data.tfds_data import PREFIX, tfds_builder, tfds_rows, tfds_text
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


Row = Mapping[str, Any] | Sequence[Any]


def numbered_labelled(
    source: LabelledSource, decoder: Decoder, shard: int, shards: int
) -> Iterator[tuple[int, DocumentOf]]:
    """(number, what decodes it) of the rows whose number % shards == shard."""
    if source.path.startswith(PREFIX):
        yield from _tfds_items(source, decoder, shard, shards)
        return
    items = (item for _, path in source.files() for item in _file_items(path, source, decoder))
    for number, document_of in enumerate(items):
        if number % shards == shard:
            yield number, document_of


def _file_items(path: Path, source: LabelledSource, decoder: Decoder) -> Iterator[DocumentOf]:
    kind = ending(path, ENDINGS)
    if kind == ".parquet":
        labels = _parquet_values(path, source.label_field)
        rows = parquet_rows(path, source.fields[:-1])
        for (where, cells), label in zip(rows, labels, strict=True):
            yield partial(_cells, decoder, cells, label, source, where)
        return
    if kind in (".csv", ".tsv"):
        for where, row in _table_rows(path, kind, source):
            yield partial(_row, decoder, row, source, where)
        return
    whole = _json_rows(path, source) if kind == ".json" else None
    if whole is not None:
        for number, row in enumerate(whole):
            yield partial(_row, decoder, row, source, f"Row {number} of {path}")
        return
    for where, raw in lines(path):
        yield partial(_json_line, decoder, raw, source, where)


def _json_rows(path: Path, source: LabelledSource) -> Sequence[Row] | None:
    """The rows of a file that is one JSON value; None for one with an object on each line."""
    first = next(lines(path), None)
    if first is None:
        return []
    if _is_row(first[1]):
        return None
    with reading(path), open_file(path) as stream:
        raw = stream.read()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is neither one JSON value nor one on each line ({error}); mend the file."
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


def _table_rows(path: Path, kind: str, source: LabelledSource) -> Iterator[tuple[str, Row]]:
    """("path:line", row) of a csv or tsv file: by name where its first row is names."""
    numbered = all(field.isdigit() for field in source.fields)
    csv.field_size_limit(LONGEST)
    with reading(path), open_file(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        if kind == ".csv":
            table = csv.reader(text)
        else:
            table = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        names: list[str] | None = None
        try:
            for cells in table:
                if not cells:
                    continue
                if names is None and not numbered:
                    names = cells
                    continue
                where = f"{path}:{table.line_num}"
                yield where, cells if names is None else dict(zip(names, cells, strict=False))
        except csv.Error as error:
            raise UserError(
                f"{path}:{table.line_num} is no row of a table ({error}); mend the file."
            ) from error


def _parquet_values(path: Path, column: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(
                    f"The parquet file {path} has no column {column!r}, it has "
                    f"{listed(file.schema_arrow.names)}; name one of them in the source's fields."
                )
            for batch in file.iter_batches(columns=[column]):
                yield from batch.column(column).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"The parquet file {path} is cut short or damaged ({error}); copy it again."
        ) from error


def _tfds_items(
    source: LabelledSource, decoder: Decoder, shard: int, shards: int
) -> Iterator[tuple[int, DocumentOf]]:
    features = tfds_builder(source.path).info.features
    feature = features[source.label_field] if source.label_field in list(features) else None
    names = getattr(feature, "names", None)
    for number, row in tfds_rows(source, source.fields, shard, shards):
        cells = [tfds_text(row, field, source) for field in source.fields[:-1]]
        label = row[source.label_field]
        if names is not None:
            label = names[int(label)] if label >= 0 else None  # -1: not labelled
        elif isinstance(label, bytes):
            label = label.decode(errors="replace")
        else:
            label = label.item()
        where = f"Example {number} of {source.path}"
        yield number, partial(_cells, decoder, cells, label, source, where)


def _json_line(decoder: Decoder, raw: bytes, source: LabelledSource, where: str) -> Document:
    return _row(decoder, decoder.json_row(raw, where), source, where)


def _row(decoder: Decoder, row: Row, source: LabelledSource, where: str) -> Document:
    """A row by name or, where it is a list, by place."""
    if not isinstance(row, dict):
        if not isinstance(row, list):
            raise Invalid(f"{where} holds a {type(row).__name__}, not a row")
        row = {str(place): value for place, value in enumerate(row)}
    texts = [decoder.field(row, field, where) or "" for field in source.fields[:-1]]
    value: Any = row
    keys = [source.label_field] if source.label_field in row else source.label_field.split(".")
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise Invalid(f"{where} has no field {source.label_field!r}, it has {listed(row)}")
        value = value[key]
    return _document(texts, value, source, where)


def _cells(
    decoder: Decoder, cells: Sequence[bytes | None], label: Any, source: LabelledSource, where: str
) -> Document:
    texts = [decoder.text(cell or b"", where) for cell in cells]
    if isinstance(label, bytes):
        label = decoder.text(label, where)
    return _document(texts, label, source, where)


def _document(texts: Sequence[str], label: Any, source: LabelledSource, where: str) -> Document:
    sides = tuple(text.strip() for text in texts)
    if any(sides) and not all(sides):
        raise Invalid(f"{where} has one text of two")
    if source.label == "number":
        return Document(sides, (_number(label, where),))
    return Document(sides, (class_name(label, where),))


def class_name(label: Any, where: str) -> str:
    """The name of a class as the store keeps it. Raises `Invalid` for what is none."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):  # tables write whole numbers so where a label is missing
        label = int(label) if label.is_integer() else label if math.isfinite(label) else None
    name = str(label).strip() if isinstance(label, (str, int, float)) else ""
    if not name or not name.isprintable():
        raise Invalid(f"{where} has no label: {label!r} is not the name of a class")
    return name


def _number(label: Any, where: str) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Invalid(f"{where} has no label: {label!r} is not a number")
    return number
