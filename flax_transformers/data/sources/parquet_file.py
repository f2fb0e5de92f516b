"""Rows of parquet files, which are read a row group at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flax_transformers.data.sources.documents import listed
from flax_transformers.data.sources.files import reading
from flax_transformers.data.sources.records import Record
from flax_transformers.errors import UserError

_ROWS = 256


@dataclass(frozen=True)
class ParquetFile:
    """A record is a row: a dict of the columns that hold ``texts`` and ``others``, with the values
    that Python has for them, but bytes for text.

    Fields are named as `fields.value_in` takes them. Row groups are spread over the file by their
    numbers of rows, and each of them is solid. Raises UserError for fields that are not there, and
    ``texts`` that hold none.
    """

    path: Path
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        with reading(self.path):
            return self.path.stat().st_size

    @cached_property
    def _metadata(self) -> Any:
        from pyarrow import parquet

        with _in_words(self.path):
            metadata = parquet.read_metadata(self.path)
            schema = metadata.schema.to_arrow_schema()
        for field in (*self.texts, *self.others):
            kind, names = _found(schema, field)
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
        """How many rows there are before each row group, and in all."""
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
        with _in_words(self.path), parquet.ParquetFile(self.path, metadata=metadata) as file:
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
        """The paths of the columns that hold the fields, and no others of the same struct."""
        schema = self._metadata.schema
        paths = [schema.column(number).path for number in range(len(schema.names))]
        found = []
        for field in (*self.texts, *self.others):
            exact = [path for path in paths if path == field or path.startswith(f"{field}.")]
            below = [path for path in paths if path.split(".")[0] == field.split(".")[0]]
            found += exact or below
        return list(dict.fromkeys(found))

    def _cells(self, file: Any, group: int) -> Iterator[dict[str, Any]]:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=self._columns):
            columns = [column.cast(_with_bytes(column.type)) for column in batch.columns]
            for values in zip(*(column.to_pylist() for column in columns), strict=True):
                yield dict(zip(batch.schema.names, values, strict=True))


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """What pyarrow raises for a damaged file, as a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"The parquet file {path} is cut short or damaged ({error}); copy it again."
        ) from error


def _found(schema: Any, field: str) -> tuple[Any, list[str]]:
    """The type of a field, or None, and the names that it could have."""
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
    """Whether values of a type are texts, lists of them, or null."""
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
    """A type with bytes for text: pyarrow would stop at invalid UTF-8 and not say where."""
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
