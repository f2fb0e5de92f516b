"""Files of a corpus: which there are, in which order, and how their bytes are read."""

from __future__ import annotations

import contextlib
import glob
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from flax_transformers.data.documents import LONGEST, listed
from flax_transformers.errors import UserError

_PARQUET_ROWS = 256


def corpus_files(path: str, endings: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) of the corpus's files in order; names do not depend on where a folder lies.

    Raises UserError where there is none, and for a file whose ending is not one of ``endings``.
    """
    if "://" in path:
        raise UserError(f"Text is read from local files or TFDS, not from {path}; copy it first.")
    root = Path(os.path.expanduser(path))
    if root.is_file():
        found = [(root.name, root)]
    elif root.is_dir():
        found = [
            (file.relative_to(root).as_posix(), file)
            for file in root.rglob("*")
            if ending(file, endings) and file.is_file() and not _hidden(file.relative_to(root))
        ]
        if not found:
            raise UserError(f"The folder {path} has no text files ({', '.join(endings)}) in it.")
    elif glob.has_magic(path):
        matches = glob.glob(str(root), recursive=True)
        found = [(name, Path(name)) for name in matches if Path(name).is_file()]
        if not found:
            raise UserError(f"No file matches the pattern {path}; check the path.")
    else:
        raise UserError(f"There is no file or folder {path}; check the path.")
    for _, file in found:
        if not ending(file, endings):
            raise UserError(f"The ending of {file} is not known; use one of {', '.join(endings)}.")
    return sorted(found)


def ending(path: Path, endings: Sequence[str]) -> str | None:
    """The longest known ending of a file's name, without .gz."""
    name = path.name.lower()
    return next((e.removesuffix(".gz") for e in endings if name.endswith(e)), None)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_file(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed if its name ends in .gz."""
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of reading as one sentence with the file's name."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"The gzip file {path} is cut short or damaged ({error}); copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


def raw_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file. Of one longer than LONGEST only the first LONGEST + 1 bytes are kept:
    then `Decoder.text` finds that it is not valid."""
    while raw := stream.readline(LONGEST + 1):
        yield raw
        while len(raw) > LONGEST and not raw.endswith(b"\n"):
            raw = stream.readline(LONGEST + 1)


def cut_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a text; those longer than LONGEST in pieces, cut at spaces where there are any.

    Together they are the text.
    """
    rest = b""
    while raw := rest + stream.readline(LONGEST - len(rest)):
        rest = b""
        if len(raw) == LONGEST and not raw.endswith(b"\n"):
            end = _cut(raw)
            raw, rest = raw[:end], raw[end:]
        yield raw


def _cut(raw: bytes) -> int:
    """Behind the last space, or else before the last character, which may not be whole."""
    end = max(raw.rfind(b" "), raw.rfind(b"\t")) + 1
    if end:
        return end
    start = len(raw) - 1
    while start > len(raw) - 4 and raw[start] & 0xC0 == 0x80:
        start -= 1
    return start


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("path:line number", bytes) of the lines that are not empty."""
    with reading(path), open_file(path) as stream:
        for number, raw in enumerate(raw_lines(stream), 1):
            if not raw.isspace():
                yield f"{path}:{number}", raw


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[bytes | None]]]:
    """("Row n of path", bytes of each column) of the rows. Raises UserError for other columns."""
    import pyarrow  # here, so that other sources do not wait for it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise UserError(
                        f"The parquet file {path} has no column {column!r}, it has "
                        f"{listed(names)}; name one of them in the source's fields."
                    )
            row = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(columns)):
                cells = [_as_bytes(batch.column(column), column, path) for column in columns]
                for values in zip(*cells, strict=True):
                    yield f"Row {row} of {path}", list(values)
                    row += 1
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
