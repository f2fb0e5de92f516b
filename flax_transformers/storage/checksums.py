"""Digests of a checkpoint's files: written with it, checked before it is read.

`DIGESTS.json` in a step folder holds the size and sha256 of every other file in it, and a sha256 of
its own contents. It is written before the step is committed, so a committed step can always be
checked. Each process hashes the subfolder of arrays that it wrote itself and leaves the result
there as a part; process 0 hashes the rest and gathers the parts.

The two small files that orbax writes while it commits cannot be known any earlier. They are added
right after, by `seal`; until then they are allowed to be there without a digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from flax_transformers.storage.remote import is_bucket

INDEX_NAME = "DIGESTS.json"
PART_NAME = "DIGESTS.part"
COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")

_CHUNK_BYTES = 4 * 2**20
_THREADS = 4

FileDigests = dict[str, list[Any]]  # relative path -> [size in bytes, sha256 in hex]


def list_files(folder: epath.Path) -> list[str]:
    """Relative POSIX paths of all files below `folder`, sorted."""
    names, pending = [], [(folder, "")]
    while pending:
        parent, prefix = pending.pop()
        for child in parent.iterdir():
            if is_folder(child):
                pending.append((child, f"{prefix}{child.name}/"))
            else:
                names.append(prefix + child.name)
    return sorted(names)


def exists(path: epath.Path) -> bool:
    """Whether there is such a file or folder. Unlike `Path.exists`, raises OSError, or what the
    client of a bucket raises, where the storage does not tell."""
    return _is_folder(path) is not None


def is_folder(path: epath.Path) -> bool:
    """Whether there is such a folder. Raises as `exists`."""
    return bool(_is_folder(path))


def _is_folder(path: epath.Path) -> bool | None:
    """None where nothing is."""
    try:
        if not is_bucket(path):
            return stat.S_ISDIR(os.stat(path).st_mode)
        import fsspec

        # Its own `exists` takes any failure for a no.
        client, name = fsspec.core.url_to_fs(os.fspath(path))
        return client.info(name)["type"] == "directory"
    except (FileNotFoundError, NotADirectoryError):
        return None


def has_index(folder: epath.Path) -> bool:
    """Whether `folder` was written with digests."""
    return exists(folder / INDEX_NAME)


def write_part(folder: epath.Path) -> None:
    """Hashes every file in the subfolder that one process wrote and leaves the result in it."""
    _write(folder / PART_NAME, _encode(_hash_files(folder, list_files(folder))))


def write_index(folder: epath.Path) -> None:
    """Writes the index of a step folder about to be committed; removes the parts it gathers.

    A part that is damaged or absent costs time, not safety: process 0 hashes those files itself.
    """
    names = list_files(folder)
    present = set(names)
    parts = [name for name in names if name.rpartition("/")[2] == PART_NAME]
    files: FileDigests = {}
    for part in parts:
        below = part.removesuffix(PART_NAME)
        try:
            read = _decode((folder / part).read_bytes())
        except ValueError:
            read = {}
        files |= {below + n: digest for n, digest in read.items() if below + n in present}
        (folder / part).unlink()
    rest = [name for name in names if name not in files and name not in (*parts, *COMMIT_FILES)]
    _write(folder / INDEX_NAME, _encode(files | _hash_files(folder, rest)))


def seal(folder: epath.Path) -> None:
    """Adds the files of the commit itself to the index of a step just committed, atomically."""
    files = _decode((folder / INDEX_NAME).read_bytes())
    late = [name for name in COMMIT_FILES if (folder / name).exists()]
    if is_bucket(folder):  # where an object is replaced whole
        _write(folder / INDEX_NAME, _encode(files | _hash_files(folder, late)))
        return
    # Beside the step folder, so that a process killed here leaves no stray file in it.
    temporary = folder.parent / f".{INDEX_NAME}.tmp"
    _write(temporary, _encode(files | _hash_files(folder, late)))
    temporary.replace(folder / INDEX_NAME)


def verify(folder: epath.Path) -> list[str]:
    """What is wrong with a step folder, one phrase per file; an empty list if all is well.

    Detects a file that is missing, added, truncated or changed by as little as one bit, the index
    itself included. Raises OSError, or what the client of a bucket raises, for a file that is there
    and cannot be read: that says nothing of what is in it.
    """
    if not has_index(folder):
        return [f"{INDEX_NAME} is missing"]
    try:
        expected = _decode((folder / INDEX_NAME).read_bytes())
    except (ValueError, RecursionError, IsADirectoryError):
        return [f"{INDEX_NAME} is damaged"]
    present = set(list_files(folder)) - {INDEX_NAME}
    missing = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    added = sorted(present - expected.keys() - set(COMMIT_FILES))
    if missing or added:
        return missing + [f"{name} does not belong to it" for name in added]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: _problem(folder, name, expected[name]), sorted(expected))
        return [problem for problem in found if problem]


def _problem(folder: epath.Path, name: str, expected: list[Any]) -> str | None:
    try:
        found = _hash_file(folder / name)
    except FileNotFoundError:
        return f"{name} is missing"
    return None if found == expected else f"{name} has changed"


def _hash_files(folder: epath.Path, names: Iterable[str]) -> FileDigests:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: _hash_file(folder / name), names)
        return dict(zip(names, found, strict=True))


def _hash_file(path: epath.Path) -> list[Any]:
    """[size in bytes, sha256 in hex], read as a stream."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def _encode(files: FileDigests) -> bytes:
    body = json.dumps(files, sort_keys=True)
    whole = {"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode()


def _decode(raw: bytes) -> FileDigests:
    """Inverse of `_encode`; ValueError unless `raw` is what it would write, to the bit."""
    whole = json.loads(raw)
    files = whole.get("files") if isinstance(whole, dict) else None
    if not isinstance(files, dict) or _encode(files) != raw:
        raise ValueError("not an index of digests, or changed since it was written")
    return files


def _write(path: epath.Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        if not is_bucket(path):
            os.fsync(file.fileno())
