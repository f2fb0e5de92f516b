"""Checksums of a checkpoint's files: written with it, verified before it is read.

`DIGESTS.json` in a step folder contains the size and sha256 of every other file in it, and a sha256
of its own content. It is written before the step is committed, so that every committed step can be
verified. Each process hashes the subfolder of arrays that it wrote and leaves the result there as a
part; process 0 hashes the rest and collects the parts.

Orbax writes two small files during the commit, and an evaluation that is made up for writes a
third. `seal` adds their checksums afterwards; until then they may exist without one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from flax_transformers.storage.file_hashes import blocks_of, record_of
from flax_transformers.storage.folders import write_atomically
from flax_transformers.storage.paths import exists, is_bucket, list_files

INDEX_NAME = "DIGESTS.json"
PART_NAME = "DIGESTS.part"
COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
META_UPDATE = "meta_update.json"
"""Fields of the step's meta that are newer than those it was saved with."""
_LATE_FILES = (*COMMIT_FILES, META_UPDATE)

_THREADS = 4

FileDigests = dict[str, list[Any]]  # relative path -> [size in bytes, sha256 in hex]


def has_index(folder: epath.Path) -> bool:
    """Whether `folder` was written with checksums."""
    return exists(folder / INDEX_NAME)


def write_part(folder: epath.Path) -> None:
    """Hashes every file in the subfolder that one process wrote and writes the result into it."""
    _write(folder / PART_NAME, _encode(_hash_files(folder, list_files(folder))))


def write_checksum_index(folder: epath.Path) -> None:
    """Writes the index of a step folder before it is committed; removes the parts it collects.

    If a part is damaged or missing, process 0 hashes those files itself.
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
    rest = [name for name in names if name not in files and name not in (*parts, *_LATE_FILES)]
    _write(folder / INDEX_NAME, _encode(files | _hash_files(folder, rest)))


def seal(folder: epath.Path) -> None:
    """Adds the files that came later to the index of a committed step, atomically."""
    files = _decode((folder / INDEX_NAME).read_bytes())
    late = [name for name in _LATE_FILES if (folder / name).exists()]
    write_late(folder, INDEX_NAME, _encode(files | _hash_files(folder, late)))


def write_late(folder: epath.Path, name: str, content: bytes) -> None:
    """Writes a file of a committed step, atomically."""
    if is_bucket(folder):  # objects are replaced atomically
        (folder / name).write_bytes(content)
    else:  # with the temporary file beside the step folder: a killed process leaves nothing in it
        write_atomically(folder / name, content, temporary=folder.parent / f".{name}.tmp")


def verify(folder: epath.Path) -> list[str]:
    """The problems of a step folder, one phrase per file; empty if it is intact.

    Detects files that are missing, added, truncated or changed, the index included. What a desktop
    or a copying program adds under a hidden name does no harm. Raises OSError, or an error of the
    bucket's client, for a file that exists and cannot be read.
    """
    if not has_index(folder):
        return [f"{INDEX_NAME} is missing"]
    try:
        expected = _decode((folder / INDEX_NAME).read_bytes())
    except (ValueError, RecursionError, IsADirectoryError):
        return [f"{INDEX_NAME} is damaged"]
    present = set(list_files(folder)) - {INDEX_NAME}
    missing = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    added = sorted(present - expected.keys() - set(_LATE_FILES))
    added = [name for name in added if not any(part.startswith(".") for part in name.split("/"))]
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
    with path.open("rb") as file:
        record = record_of(blocks_of(file))
    return [record.bytes, record.sha256]


def _encode(files: FileDigests) -> bytes:
    body = json.dumps(files, sort_keys=True)
    whole = {"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode()


def _decode(raw: bytes) -> FileDigests:
    """Inverse of `_encode`. Raises ValueError unless `raw` is exactly what it would write."""
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
