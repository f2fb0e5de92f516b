"""sha256 of files: of their content as it is read or written, and cached for large corpora."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

from flax_transformers.errors import UserError
from flax_transformers.storage.folders import write_atomically

_BLOCK = 1 << 22
_THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """Size and hexadecimal sha256 of one file."""

    bytes: int
    sha256: str


def record_of(blocks: Iterable[Any]) -> FileRecord:
    """The record of a file whose content comes in blocks of bytes."""
    hashed, size = hashlib.sha256(), 0
    for block in blocks:
        hashed.update(block)
        size += len(block)
    return FileRecord(size, hashed.hexdigest())


def blocks_of(file: IO[bytes]) -> Iterator[bytes]:
    """The content of an open file."""
    while block := file.read(_BLOCK):
        yield block


class HashedFile:
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by finish, discard)
        self._hash = hashlib.sha256()

    def write(self, content: Any) -> None:
        """Appends bytes, or another buffer of bytes."""
        self._file.write(content)
        self._hash.update(content)
        self.size += len(content)

    def finish(self, *, lasting: bool = False) -> FileRecord:
        """Closes the file; if it is to be ``lasting``, syncs it before."""
        if lasting:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self.size, self._hash.hexdigest())

    def discard(self) -> None:
        """Closes and removes the file."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which may fail too
            self._file.close()
        self.path.unlink(missing_ok=True)


NamedFiles = Sequence[tuple[str, Path]]
"""(name, path) of files in order. The name is hashed: it stands for what depends on it, such as the
file format."""
_digests: dict[str, str] = {}
"""Digests found by this process, by the state of the files, if the cache is not writable."""
_SETTLED_S = 2.0
"""A file can change twice within the resolution of its times: younger files are not cached."""


def cache_root() -> str:
    """The folder of files that can be created again; below /tmp for a user without a home."""
    home = os.path.expanduser("~")
    if home == "~":  # no HOME, and no entry in the list of users, as in some containers
        home = os.path.join(tempfile.gettempdir(), f"user-{os.getuid()}")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return os.path.join(cache, "flax_transformers")


def sizes_digest(files: NamedFiles) -> str:
    """sha256 of names and sizes; reads no file."""
    return _digest([(name, _stat(path).st_size) for name, path in files])


def content_digest(files: NamedFiles) -> str:
    """sha256 of names, sizes and contents.

    Reads every file, unless they were read before and still have the same size, inode and times.
    """
    began = time.time()
    state = _state(files)
    key = _digest(state)
    if key in _digests:
        return _digests[key]
    kept = os.path.join(cache_root(), "contents", key)
    with contextlib.suppress(OSError):
        known = Path(kept).read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = threads.map(_sha256, [path for _, path in files])
        found = zip(files, hashes, strict=True)
        digest = _digest([(name, *astuple(record)) for (name, _), record in found])
    newest = max((max(times) for *_, times in state), default=0) / 1e9
    if newest < began - _SETTLED_S and _state(files) == state:
        _digests[key] = digest
        keep(kept, digest)
    return digest


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The file {path} cannot be read ({error.strerror or error}); make it readable, or "
            "leave it out of the source."
        ) from error


def _state(files: NamedFiles) -> list[tuple[str, str, int, int, int, tuple[int, int]]]:
    found = []
    for name, path in files:
        stat = _stat(path)
        times = stat.st_mtime_ns, stat.st_ctime_ns
        found.append((name, os.path.abspath(path), stat.st_size, stat.st_dev, stat.st_ino, times))
    return found


def _stat(path: Path) -> os.stat_result:
    with _reading(path):
        return path.stat()


def _sha256(path: Path) -> FileRecord:
    with _reading(path), path.open("rb") as file:
        return record_of(blocks_of(file))


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def keep(path: str, text: str) -> None:
    """Writes a file of the cache; one that cannot be written only costs time later."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, text.encode(), temporary=f"{path}.{os.getpid()}", lasting=False)
