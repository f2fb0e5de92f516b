"""Reads the bytes and lines of corpus files, also of compressed ones."""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from flax_transformers.data.sources.documents import LONGEST
from flax_transformers.errors import UserError

_BLOCK = 1 << 12
"""Compressed bytes decompressed at once. Stores depend on it: it decides which records of a
compressed file have the same position, and so their shards."""
_BUFFER = 1 << 16
_WINDOW = 1 << 31  # the largest window of `zstd --long`; memory is allocated as needed


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()


_DECOMPRESSORS: dict[str, tuple[str, Callable[[], Any]]] = {
    ".gz": ("gzip", lambda: zlib.decompressobj(wbits=31)),
    ".bz2": ("bzip2", bz2.BZ2Decompressor),
    ".xz": ("xz", lzma.LZMADecompressor),
    ".zst": ("zstd", _zstd),
}
"""The name of a format, and a decompressor for one member of a file, by ending."""
COMPRESSED = tuple(_DECOMPRESSORS)
"""Endings of compressed files."""


class _Damaged(Exception):
    """Compressed data cannot be decompressed."""


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed, and so can only be read from its beginning."""
    return path.suffix.lower() in _DECOMPRESSORS


def open_decompressed(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed if its name ends in one of COMPRESSED."""
    return Stream(path).file


class Stream:
    """The decompressed bytes of a file, and their positions in the stored file.

    ``file`` yields the bytes. A context manager, which closes it.
    """

    def __init__(self, path: Path) -> None:
        known = _DECOMPRESSORS.get(path.suffix.lower())
        raw = path.open("rb", buffering=_BUFFER)
        self._inflated = None if known is None else _Inflated(raw, known[1])
        self.file: IO[bytes] = (
            raw if self._inflated is None else io.BufferedReader(self._inflated, _BUFFER)
        )

    def position(self, offset: int) -> int:
        """The position in the stored file of the byte at ``offset`` of ``file``.

        In a compressed file, the start of the block that contains the byte; ``offset`` must have
        been read, and must not decrease from call to call.
        """
        return offset if self._inflated is None else self._inflated.position(offset)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.file.close()


class _Inflated(io.RawIOBase):
    """Decompresses a file by blocks; it may have several members, with zeros between them."""

    def __init__(self, raw: IO[bytes], make: Callable[[], Any]) -> None:
        self._raw, self._make = raw, make
        self._decompressor: Any = None
        self._begun = False
        self._left = memoryview(b"")
        self._read = self._given = 0
        self._blocks: deque[tuple[int, int]] = deque([(0, 0)])  # (first offset, position)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def position(self, offset: int) -> int:
        while len(self._blocks) > 1 and self._blocks[1][0] <= offset:
            self._blocks.popleft()
        return self._blocks[0][1]

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = self._raw.read(_BLOCK)
            if not block:
                if self._decompressor is not None or not self._begun:
                    raise _Damaged("it ends before its end-of-stream marker")
                return 0
            try:
                self._left = memoryview(self._decompressed(block))
            except Exception as error:  # libraries raise different errors, some OSError
                raise _Damaged(str(error)) from error
            if self._left:
                self._blocks.append((self._given, self._read))
            self._read += len(block)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        self._given += count
        return count

    def _decompressed(self, block: bytes) -> bytes:
        found = []
        while block:
            if self._decompressor is None:
                block = block.lstrip(b"\0") if self._begun else block
                if not block:
                    break
                self._decompressor, self._begun = self._make(), True
            found.append(self._decompressor.decompress(block))
            block = b""
            if self._decompressor.eof:
                block, self._decompressor = self._decompressor.unused_data, None
        return b"".join(found)


@contextlib.contextmanager
def reading_source(path: Path) -> Iterator[None]:
    """Turns errors of reading into a UserError that names the file."""
    try:
        yield
    except _Damaged as error:
        name, _ = _DECOMPRESSORS[path.suffix.lower()]
        raise UserError(
            f"The {name} file {path} is cut short or damaged ({error}); copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


class Place:
    """The position of a record in a text file: path and offset of its first byte."""

    __slots__ = ("offset", "path")

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset = path, offset

    def __str__(self) -> str:
        """With the line number, for which the file is read up to the record."""
        try:
            with reading_source(self.path), Stream(self.path) as stream:
                line, left = 1, self.offset
                while block := stream.file.read(min(left, 1 << 20)):
                    line += block.count(b"\n")
                    left -= len(block)
        except UserError:  # it was readable before
            return f"{self.path}, byte {self.offset},"
        return f"{self.path}:{line}"


def line_start(file: IO[bytes], start: int, stop: int | None) -> int | None:
    """Moves to the first line that begins in [start, stop); returns its offset, None without one.

    Reads at most one block after ``stop``.
    """
    if start == 0:
        return 0
    file.seek(start - 1)
    offset = start - 1
    while stop is None or offset < stop - 1:
        piece = file.readline(_BUFFER)
        offset += len(piece)
        if piece.endswith(b"\n"):
            return offset if stop is None or offset < stop else None
        if not piece:
            break
    return None


def is_blank_before(file: IO[bytes], offset: int) -> bool:
    """Whether the line that ends at ``offset`` is one line of `cut_lines` without visible
    characters; moves back to ``offset``."""
    blank = _is_blank(file, offset)
    file.seek(offset)
    return blank


def _is_blank(file: IO[bytes], offset: int) -> bool:
    start = offset - 1  # the part after it has been checked
    while start > 0 and offset - start <= LONGEST:
        first = max(0, start - 256)
        file.seek(first)
        piece = file.read(start - first)
        line = piece.rpartition(b"\n")[2]
        if line and not line.isspace():
            return False
        start -= len(line)
        if len(line) < len(piece):
            break
    return offset - start <= LONGEST


def raw_lines(file: IO[bytes], offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines of a file at position ``offset``.

    A line longer than LONGEST is truncated to LONGEST + 1 bytes, which `Decoder.text` rejects.
    """
    while raw := file.readline(LONGEST + 1):
        yield offset, raw
        offset += len(raw)
        while len(raw) > LONGEST and not raw.endswith(b"\n"):
            raw = file.readline(LONGEST + 1)
            offset += len(raw)


def cut_lines(stream: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """(bytes, whether a line ends here) of the lines of a text; concatenated, they are the text.

    Lines longer than LONGEST are split, at spaces if there are any.
    """
    rest = b""
    while raw := rest + stream.readline(LONGEST - len(rest)):
        rest = b""
        ends = raw.endswith(b"\n") or len(raw) < LONGEST
        if not ends:
            end = _cut(raw)
            raw, rest = raw[:end], raw[end:]
        yield raw, ends


def _cut(raw: bytes) -> int:
    """The position after the last space, or else before the last, maybe incomplete, character."""
    end = max(raw.rfind(b" "), raw.rfind(b"\t")) + 1
    if end:
        return end
    start = len(raw) - 1
    while start > len(raw) - 4 and raw[start] & 0xC0 == 0x80:
        start -= 1
    return start
