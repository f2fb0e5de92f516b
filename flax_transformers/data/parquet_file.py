"""Rows of parquet files, which are read a row group at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flax_transformers.data.documents import listed
from flax_transformers.data.files import reading
from flax_transformers.data.records import Record
from flax_transformers.errors import UserError

_ROWS = 256


@dataclass(frozen=True)
class ParquetFile:
    """A record is a row: the bytes of each of ``columns``, None for null, and then the values of
    ``values`` as Python has them.

    Row groups are spread over the file by their numbers of rows, and each of them is solid. Raises
    UserError for columns that are not there, or hold no text.
    """

    path: Path
    columns: tuple[str, ...]
    values: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        with reading(self.path):
            return self.path.stat().st_size

    @cached_property
    def _metadata(self) -> Any:
        from pyarrow import parquet

        with _in_words(self.path):
            metadata = parquet.read_metadata(self.path)
            names = metadata.schema.to_arrow_schema().names
        for column in (*self.columns, *self.values):
            if column not in names:
                raise UserError(
                    f"The parquet file {self.path} has no column {column!r}, it has "
                    f"{listed(names)}; name one of them in the source's fields."
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

    def _cells(self, file: Any, group: int) -> Iterator[tuple[Any, ...]]:
        asked = list(dict.fromkeys((*self.columns, *self.values)))
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=asked):
            texts = [_as_bytes(batch.column(name), name, self.path) for name in self.columns]
            values = [batch.column(name).to_pylist() for name in self.values]
            yield from zip(*texts, *values, strict=True)


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


def _as_bytes(column: Any, name: str, path: Path) -> list[bytes | None]:
    """A column of text. As bytes: pyarrow itself would stop at invalid UTF-8 and not say where."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text(column.type):
        raise UserError(
            f"The column {name!r} of {path} is of type {column.type}, not text; name a text "
            "column in the source's fields."
        )
    return column.cast(pyarrow.large_binary()).to_pylist()


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    checks = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*checks, types.is_null))
