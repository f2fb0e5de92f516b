"""Records with fields, the same for all sources: lines of JSON, tables and parquet files.

A record is an object, whose fields have names, or a list, whose fields have numbers from 0. Readers
give texts as str or, where the file stores them so, as bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import LONGEST, Decoder, Invalid, Where, listed
from flax_transformers.data.sources.files import open_decompressed, raw_lines, reading_source
from flax_transformers.data.sources.records import (
    LineFile,
    Record,
    Records,
    TableFile,
    ValueFile,
    WrongRow,
)
from flax_transformers.data.sources.splits import SPLIT_WORDS
from flax_transformers.errors import UserError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_BEGIN = 1 << 12  # bytes that are read to recognize a list of rows
_ROWS_AT_ONCE = 256  # of a parquet file

Row = Mapping[str, Any] | Sequence[Any]


def row_file(
    path: Path,
    split: str,
    texts: Sequence[str],
    others: Sequence[str] = (),
    *,
    inside: bool = False,
) -> Records:
    """The records of a file, for `row_of`. ``texts`` and ``others``: the fields to read.

    ``split``: the one to read of a JSON file with several; ``inside``: whether it must be one, see
    `Listing`. If all fields are numbers, they are
    columns of a table without a header.
    """
    kind, fields = ending(path, ENDINGS), (*texts, *others)
    if kind == ".parquet":
        return ParquetFile(path, tuple(texts), tuple(others))
    if kind in (".csv", ".tsv"):
        names = () if all(field.isdecimal() for field in fields) else fields
        return TableFile(path, "," if kind == ".csv" else "\t", kind == ".csv", names)
    if kind == ".json":
        return ChosenFile(path, partial(_json_file, path, split, fields, inside))
    return LineFile(path)


@dataclass(frozen=True)
class ChosenFile:
    """A file whose records are determined by ``choose``, which reads its beginning."""

    path: Path
    choose: Callable[[], Records]

    @cached_property
    def _records(self) -> Records:
        return self.choose()

    @property
    def size(self) -> int:
        return LineFile(self.path).size

    def solid(self, position: int) -> tuple[int, int]:
        return self._records.solid(position)

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        return self._records.read(start, stop)


def first_lines(path: Path, count: int) -> list[bytes]:
    """The first non-empty lines of a file."""
    with reading_source(path), open_decompressed(path) as file:
        lines = (raw for _, raw in raw_lines(file) if not raw.isspace())
        return list(itertools.islice(lines, count))


def _json_file(path: Path, split: str, fields: Sequence[str], inside: bool) -> Records:
    """Records of a JSON file: its lines, or the rows of its one value."""
    if _has_row_in_line(path, fields):
        if inside:
            raise _no_splits(path, split)
        return LineFile(path)
    return ValueFile(path, partial(_rows, split, inside))


def has_splits(path: Path, splits: Sequence[str]) -> bool:
    """Whether a JSON file is an object with a value for each of ``splits``."""
    if _has_row_in_line(path, ()):
        return False
    value = _value(path)
    return isinstance(value, dict) and value.keys() >= {*splits}


def _has_row_in_line(path: Path, fields: Sequence[str]) -> bool:
    """Whether each line of a JSON file is a row, judged by its first lines."""
    with reading_source(path), open_decompressed(path) as file:
        begin = file.read(_BEGIN).removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin.startswith(b"["):
        return not begin[1:].lstrip().startswith((b"[", b"{", b"]"))
    lines = first_lines(path, 2)
    if not lines:
        return True
    if len(lines[0]) > LONGEST:
        return False
    text = lines[0].decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos < len(text)  # else the value continues after the line
    except (ValueError, RecursionError):
        return True
    if len(lines) > 1:
        return True
    if not isinstance(value, dict) or any(field.split(".")[0] in value for field in fields):
        return True
    return not _lists(value)


def _lists(value: dict[str, Any]) -> list[str]:
    """Names of the lists of rows in an object, or of all lists if there are none."""
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list)}
    of_rows = [name for name, rows in lists.items() if rows and isinstance(rows[0], dict | list)]
    return of_rows or list(lists)


def _value(path: Path) -> Any:
    with reading_source(path), open_decompressed(path) as stream:
        raw = stream.read()
    try:
        return json.loads(raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is neither one JSON value nor one on each line ({error}); fix the file."
        ) from error


def _rows(split: str, inside: bool, path: Path) -> Sequence[Any]:
    """The rows of a file with one JSON value."""
    value = _value(path)
    if isinstance(value, dict):
        value = value[_list_name(value, split, inside, path)]
    elif inside:
        raise _no_splits(path, split)
    if not isinstance(value, list):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not a list of rows.")
    return value


def _no_splits(path: Path, split: str) -> UserError:
    return UserError(
        f"{path} has no split {split!r}, and no splits at all; leave out the source's split."
    )


def _list_name(value: dict[str, Any], split: str, inside: bool, path: Path) -> str:
    """The name of the list of rows in an object: the split, or the only list."""
    if split in value:
        return split
    lists = _lists(value)
    if len(lists) == 1 and lists[0].lower() not in SPLIT_WORDS:
        if inside:
            raise _no_splits(path, split)
        return lists[0]
    raise UserError(
        f"{path} has no split {split!r}, it has {listed(value)}; set the source's split."
    )


@dataclass(frozen=True)
class ParquetFile:
    """A record is a row: a dict of the columns of ``texts`` and ``others``, as Python values, with
    bytes for text.

    Fields are named as in `value_in`. Positions are in proportion to the numbers of rows, and each
    row group is solid. Raises UserError for missing fields, and for ``texts`` that are not text.
    """

    path: Path
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        with reading_source(self.path):
            return self.path.stat().st_size

    @cached_property
    def _metadata(self) -> Any:
        from pyarrow import parquet

        with reading_parquet(self.path):
            metadata = parquet.read_metadata(self.path)
            schema = metadata.schema.to_arrow_schema()
        for field in (*self.texts, *self.others):
            kind, names = _field_type(schema, field)
            if kind is None:
                raise UserError(
                    f"The parquet file {self.path} has no column {field!r}, it has "
                    f"{listed(names)}; name one of them in the source's fields."
                )
            if field in self.texts and not _is_text(kind):
                raise UserError(
                    f"The column {field!r} of {self.path} is of type {kind}, not text; name a text "
                    "column in the source's fields."
                )
        return metadata

    @cached_property
    def _rows(self) -> list[int]:
        """Number of rows before each row group, and in total."""
        groups = range(self._metadata.num_row_groups)
        sizes = (self._metadata.row_group(group).num_rows for group in groups)
        return [0, *itertools.accumulate(sizes)]

    def _position(self, row: int) -> int:
        return self.size * row // self._rows[-1]

    def solid(self, position: int) -> tuple[int, int]:
        for before, after in itertools.pairwise(self._rows):
            if before < after and self._position(before) <= position < self._position(after):
                return self._position(before), self._position(after)
        return position, position

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        from pyarrow import parquet

        rows, metadata = self._rows, self._metadata
        with reading_parquet(self.path), parquet.ParquetFile(self.path, metadata=metadata) as file:
            for group, (before, after) in enumerate(itertools.pairwise(rows)):
                if before == after or self._position(after - 1) < start:
                    continue
                if stop is not None and self._position(before) >= stop:
                    return
                for row, cells in enumerate(self._cells(file, group), before):
                    position = self._position(row)
                    if stop is not None and position >= stop:
                        return
                    if position >= start:
                        yield Record(position, cells, f"Row {row} of {self.path}")

    @cached_property
    def _columns(self) -> list[str]:
        """The paths of the columns of the fields, without others of the same struct."""
        schema = self._metadata.schema
        paths = [schema.column(number).path for number in range(len(schema.names))]
        found = []
        for field in (*self.texts, *self.others):
            exact = [path for path in paths if path == field or path.startswith(f"{field}.")]
            below = [path for path in paths if path.split(".")[0] == field.split(".")[0]]
            found += exact or below
        return list(dict.fromkeys(found))

    def _cells(self, file: Any, group: int) -> Iterator[dict[str, Any]]:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self._columns):
            columns = [column.cast(_with_bytes(column.type)) for column in batch.columns]
            for values in zip(*(column.to_pylist() for column in columns), strict=True):
                yield dict(zip(batch.schema.names, values, strict=True))


@contextlib.contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors for a damaged file into a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"The parquet file {path} is cut short or damaged ({error}); copy it again."
        ) from error


def _field_type(schema: Any, field: str) -> tuple[Any, list[str]]:
    """The type of a field, or None, and the existing names."""
    from pyarrow import types

    names = list(schema.names)
    if field in names:
        return schema.field(field).type, names
    first, *rest = field.split(".")
    if not rest or first not in names:
        return None, names
    kind = schema.field(first).type
    for key in rest:
        while _is_list(kind):
            kind = kind.value_type
        if not types.is_struct(kind):
            return None, names
        index = kind.get_field_index(key)
        if index < 0:
            return None, [f"{first}.{kind.field(i).name}" for i in range(kind.num_fields)]
        kind, first = kind.field(index).type, f"{first}.{key}"
    return kind, names


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    names = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _is_text(kind: Any) -> bool:
    """Whether values of a type are texts, lists of texts, or null."""
    from pyarrow import types

    while _is_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_null(kind) or _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    checks = [getattr(types, f"is_{name}") for name in (*names, "fixed_size_binary")]
    return any(check(kind) for check in checks)


def _with_bytes(kind: Any) -> Any:
    """A type with bytes for text, because pyarrow's error for invalid UTF-8 names no row."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if _is_bytes(kind):
        return pyarrow.large_binary()
    if _is_list(kind):
        return pyarrow.large_list(_with_bytes(kind.value_type))
    if types.is_struct(kind):
        fields = (kind.field(number) for number in range(kind.num_fields))
        return pyarrow.struct([field.with_type(_with_bytes(field.type)) for field in fields])
    return kind


def row_of(decoder: Decoder, content: Any, where: Where) -> Row:
    """The content of a record, parsed if it is a line of JSON. Raises `Invalid`."""
    if isinstance(content, WrongRow):
        raise Invalid(where, content.problem)
    if isinstance(content, bytes):
        text = decoder.text(content, where).removeprefix("\ufeff")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Invalid(where, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict | list):
        raise Invalid(where, f"holds a JSON {type(content).__name__}, not an object")
    return content


def value_in(row: Row, field: str, where: Where) -> Any:
    """The value of a field; None for null. Raises `Invalid` if it is missing.

    "a.b" is the field with that name or else field b of the object a; of a list of objects, the
    list of their values. Fields of null are null.
    """
    if isinstance(row, list):
        if not field.isdecimal():
            raise Invalid(where, f"holds a JSON list, not one object with the field {field!r}")
        row = {str(place): value for place, value in enumerate(row)}
    value: Any = row
    for key in [field] if field in row else field.split("."):
        if value is None:
            return None
        objects = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) and key in one for one in objects):
            raise Invalid(where, f"has no field {field!r}, it has {listed(row)}")
        found = [one[key] for one in objects]
        value = found if isinstance(value, list) else found[0]
    return value


def text_in(decoder: Decoder, row: Row, field: str, where: Where) -> str:
    """The text in a field; empty for null. Raises `Invalid`.

    A list of texts is joined by line ends, without nulls. Invalid bytes and lone surrogates are
    handled by the decoder.
    """
    value = value_in(row, field, where)
    if value is None:
        return ""
    lines = value if isinstance(value, list) else [value]
    wrong = next((one for one in lines if not isinstance(one, str | bytes | None)), None)
    if wrong is not None:
        holds = type(wrong).__name__ if wrong is value else f"list of {type(wrong).__name__}"
        raise Invalid(where, f"has a {holds} in {field!r}, not text")
    return "\n".join(_decoded(decoder, line, where) for line in lines if line is not None)


def _decoded(decoder: Decoder, text: str | bytes, where: Where) -> str:
    if isinstance(text, bytes):
        return decoder.text(text, where)
    if text.isascii():
        return text
    try:  # invalid bytes of a table are surrogates
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return decoder.unpaired(text, _TextOf(where))
    return decoder.text(raw, _TextOf(where))


@dataclass(frozen=True)
class _TextOf:
    where: Where

    def __str__(self) -> str:
        return f"The text of {self.where}"
