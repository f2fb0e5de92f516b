"""Files of records with fields, the same for all sources: JSON, tables and parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import LONGEST, listed
from flax_transformers.data.sources.files import open_file, raw_lines, reading
from flax_transformers.data.sources.parquet_file import ParquetFile
from flax_transformers.data.sources.records import LineFile, Record, Records, TableFile, ValueFile
from flax_transformers.errors import UserError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_BEGIN = 1 << 12  # bytes that tell a list of rows from rows
_SPLITS = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "eval", "evaluation")
)
"""Names that tell the splits of a file of JSON from a list of all its rows."""


def row_file(path: Path, split: str, texts: Sequence[str], others: Sequence[str] = ()) -> Records:
    """The records of a file. ``texts`` and ``others``: the fields that are read of them.

    Each is what `fields.row_of` takes. ``split`` is read of a JSON file that holds several. Fields
    that are all numbers are columns of a table without names.
    """
    kind, fields = ending(path, ENDINGS), (*texts, *others)
    if kind == ".parquet":
        return ParquetFile(path, tuple(texts), tuple(others))
    if kind in (".csv", ".tsv"):
        names = () if all(field.isdecimal() for field in fields) else fields
        return TableFile(path, "," if kind == ".csv" else "\t", kind == ".csv", names)
    if kind == ".json":
        return ChosenFile(path, partial(_json_file, path, split, fields))
    return LineFile(path)


@dataclass(frozen=True)
class ChosenFile:
    """A file whose beginning, which ``choose`` reads, says what its records are."""

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
    """The first lines of a file that are not empty."""
    with reading(path), open_file(path) as file:
        lines = (raw for _, raw in raw_lines(file) if not raw.isspace())
        return list(itertools.islice(lines, count))


def _json_file(path: Path, split: str, fields: Sequence[str]) -> Records:
    """A record is a line, or a row of the one value that the file holds."""
    if _has_row_in_line(path, fields):
        return LineFile(path)
    return ValueFile(path, partial(_rows, split))


def _has_row_in_line(path: Path, fields: Sequence[str]) -> bool:
    """Whether each line of a file of JSON is a row, by its first lines."""
    with reading(path), open_file(path) as file:
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
        return error.pos < len(text)  # else the line ends before the value does
    except (ValueError, RecursionError):
        return True
    if len(lines) > 1:
        return True
    if not isinstance(value, dict) or any(field.split(".")[0] in value for field in fields):
        return True
    return not _lists(value)


def _lists(value: dict[str, Any]) -> list[str]:
    """Names of the lists of rows in an object, or else of all lists."""
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list)}
    of_rows = [name for name, rows in lists.items() if rows and isinstance(rows[0], dict | list)]
    return of_rows or list(lists)


def _rows(split: str, path: Path) -> Sequence[Any]:
    """The rows of a file that is one JSON value."""
    with reading(path), open_file(path) as stream:
        raw = stream.read()
    try:
        value = json.loads(raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is neither one JSON value nor one on each line ({error}); fix the file."
        ) from error
    if isinstance(value, dict):
        value = value[_list_name(value, split, path)]
    if not isinstance(value, list):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not a list of rows.")
    return value


def _list_name(value: dict[str, Any], split: str, path: Path) -> str:
    """Which list of an object holds the rows: that of the split, or else the only one."""
    if split in value:
        return split
    lists = _lists(value)
    if len(lists) == 1 and lists[0].lower() not in _SPLITS:
        return lists[0]
    raise UserError(
        f"{path} has no split {split!r}, it has {listed(value)}; set the source's split."
    )
