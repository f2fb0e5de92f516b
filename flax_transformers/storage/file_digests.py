"""Digests of local files by their content, cached by size, inode and times of modification."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flax_transformers.errors import UserError

NamedFiles = Sequence[tuple[str, Path]]
"""(name, path) of files in order. A name says what depends on it, such as the ending."""
_BLOCK = 1 << 22
_THREADS = 4
_digests: dict[str, str] = {}
"""Those found in this process, by the state of the files, for where the cache is read-only."""
_SETTLED_S = 2.0
"""A file can change twice within the resolution of its time: younger ones are read again."""


def cache_root() -> str:
    """Where the package keeps what it can make again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "flax_transformers")


def sizes_digest(files: NamedFiles) -> str:
    """sha256 of names and sizes; reads no file."""
    return _digest([(name, _stat(path).st_size) for name, path in files])


def content_digest(files: NamedFiles) -> str:
    """sha256 of names, sizes and contents.

    Reads every file, unless they were read before and have the size, inode and times of then.
    """
    began = time.time()
    state = _state(files)
    key = _digest(state)
    if key in _digests:
        return _digests[key]
    kept = os.path.join(cache_root(), "contents", key)
    with contextlib.suppress(OSError):
        found = Path(kept).read_text()
        if re.fullmatch("[0-9a-f]{64}", found):
            return found
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = threads.map(_sha256, [path for _, path in files])
        digest = _digest([(name, *hashed) for (name, _), hashed in zip(files, hashes, strict=True)])
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
        raise UserError(f"Cannot read {path}: {error}.") from error


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


def _sha256(path: Path) -> tuple[int, str]:
    """Size and digest of what was read."""
    hashed, size = hashlib.sha256(), 0
    with _reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
            size += len(block)
    return size, hashed.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def keep(path: str, text: str) -> None:
    """Writes a file of the cache; one that cannot be written only costs time later."""
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w") as file:
            file.write(text)
        os.replace(temporary, path)
