"""Whose a store's folder is: what it is made from, and who may write in it.

The first writer notes in ``corpus.json`` what the store is made from; anything else is refused from
then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Any

from flax_transformers.data import sources
from flax_transformers.data.config import TextData
from flax_transformers.data.folders import Folder, LocalFolder, writing
from flax_transformers.data.store import to_json
from flax_transformers.errors import UserError

CORPUS = "corpus.json"


def corpus_of(data: TextData) -> dict[str, Any]:
    """All that a store's bytes depend on: the settings, and a fingerprint of the content."""
    content = [sources.fingerprint(data.source)]
    if data.validation_source is not None:
        content.append(sources.fingerprint(data.validation_source))
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return {"settings": settings_of(data), "content": digest}


def settings_of(data: TextData) -> dict[str, Any]:
    """The fields that a store's bytes depend on, as JSON."""
    names = ("source", "validation_source", "validation_fraction", "tokenizer", "gates", "shards")
    chosen = {name: value for name, value in asdict(data).items() if name in names}
    chosen["tokenizer"] = data.tokenizer.settings
    if data.target_tokenizer is not None:
        chosen["target_tokenizer"] = data.target_tokenizer.settings
    return json.loads(to_json(chosen))


def content_if_there(data: TextData) -> str | None:
    """A finished store can be used where its corpus is not at hand."""
    try:
        return corpus_of(data)["content"]
    except UserError:
        return None


def digest(record: dict[str, Any]) -> str:
    """sha256 of a JSON record."""
    return hashlib.sha256(to_json(record)).hexdigest()


def claim(folder: Folder, corpus: dict[str, Any]) -> None:
    """From now on the folder belongs to this corpus and these settings."""
    if folder.exists(CORPUS):
        refuse_other(folder, _claimed(folder), corpus["settings"], corpus["content"])
    else:
        folder.write(CORPUS, to_json(corpus))


def _claimed(folder: Folder) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(CORPUS))
        if isinstance(found["settings"], dict) and isinstance(found["content"], str):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        f"The file {CORPUS} of the unfinished store in {folder.path} is damaged; delete the "
        "store and prepare it again."
    )


def refuse_other(
    folder: Folder, found: dict[str, Any], settings: dict[str, Any], content: str | None
) -> None:
    """Raises UserError if a store made from ``found`` is not what is asked for, naming both."""
    theirs, ours = _flat(found["settings"]), _flat(settings)
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if names:
        was, asked = (
            ", ".join(f"{name}={side.get(name)!r}" for name in names) for side in (theirs, ours)
        )
    elif content not in (None, found["content"]):
        was = f"corpus {found['content'][:12]} ({ours['source.path']})"
        asked = f"corpus {str(content)[:12]}, as the same files have changed since"
    else:
        return
    raise UserError(
        f"The store in {folder.path} was made with {was}; this run asks for {asked}; choose "
        "another store directory, or delete that one to make it anew."
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


@contextlib.contextmanager
def only_one(folder: Folder) -> Iterator[None]:
    """One writer at a time on a local disk; also clears away what killed writers left.

    Without locks (some network disks, Windows, buckets) two writers at once only do the same work
    twice: each has temporary names of its own and both arrive at the same bytes.
    """
    with _lock(folder, alone=True) as locked:
        if locked and isinstance(folder, LocalFolder):
            folder.remove_temporaries()
        try:
            yield
        finally:  # a killed run's processes may have lived a moment longer
            if locked and isinstance(folder, LocalFolder):
                folder.remove_temporaries()


@contextlib.contextmanager
def one_of_several(folder: Folder) -> Iterator[None]:
    """A writer beside others of its kind, each with shards of its own; `only_one` keeps out."""
    with _lock(folder, alone=False):
        yield


@contextlib.contextmanager
def _lock(folder: Folder, alone: bool) -> Iterator[bool]:
    """Whether there is a lock; it ends with the process, however that ends."""
    if not isinstance(folder, LocalFolder):
        yield False
        return
    with writing(folder.path):
        os.makedirs(folder.path, exist_ok=True)
        file = open(os.path.join(folder.path, ".lock"), "a")  # noqa: SIM115
    with file:
        yield _locked(file, folder, alone)


def _locked(file: IO[str], folder: Folder, alone: bool) -> bool:
    try:
        import fcntl

        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for the process that prepares {folder.path}", file=sys.stderr)
            fcntl.flock(file, kind)
    except (ImportError, OSError):
        return False
    return True
