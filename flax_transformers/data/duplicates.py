"""Documents that repeat an earlier one, found in two passes of bounded memory.

First every shard writes the 128-bit hashes of its documents, in any order and by any process; then
equal hashes are looked for, a slice of all hashes at a time. The first of its kind in the corpus
stays, so what is found depends on nothing but the corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from flax_transformers.data import sources
from flax_transformers.data.config import TextData
from flax_transformers.data.documents import Counts, Document
from flax_transformers.data.folders import Folder
from flax_transformers.data.gates import let_in
from flax_transformers.data.shard_work import Note, for_each_shard
from flax_transformers.data.store import Split
from flax_transformers.errors import UserError

FOUND = "duplicates/found"
HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
_BEFORE = 1 << 62  # places of validation documents are below 0, so that they come first
_NOTED = 1000  # documents between notes
_AT_ONCE = 1 << 24  # hashes compared at once: some 800 MB with temporaries


def hash_shards(folder: Folder, data: TextData, processes: int) -> None:
    """Writes the hashes of the documents of those shards that have none yet."""
    missing = [shard for shard in range(data.shards) if not folder.exists(_hashes(shard))]
    work = partial(_hash_shard, folder, data)
    for_each_shard(work, missing, processes, done="hashed", total=data.shards)


def _hash_shard(folder: Folder, data: TextData, shard: int, note: Note) -> None:
    folder.write(_hashes(shard), _sealed(np.fromiter(_rows(data, shard, note), HASH)))


def _rows(data: TextData, shard: int, note: Note) -> Iterator[tuple[int, int, int]]:
    for source, before in ((data.validation_source, _BEFORE), (data.source, 0)):
        if source is None:
            continue
        documents = sources.read_documents(source, shard, data.shards)
        for count, (number, document) in enumerate(let_in(documents, data.gates, Counts()), 1):
            yield *_hash(document), number - before
            if count % _NOTED == 0:
                note(_NOTED, 0)


def _hash(document: Document) -> tuple[int, int]:
    """128 bits of the text with each run of whitespace as one space, and of the labels."""
    texts = [document.text] if isinstance(document.text, str) else document.text
    content = "\0".join(" ".join(text.split()) for text in texts)
    labels = repr(document.labels) if document.labels else ""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(content.encode("utf-8", "surrogatepass"))
    digest.update(f"\0\0{labels}".encode())
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def find_duplicates(folder: Folder, shards: int) -> None:
    """Compares the hashes of all shards and writes which documents are repeats, the last step."""
    documents = sum(len(_unsealed(folder, _hashes(shard), HASH)) for shard in range(shards))
    slices = 1 + documents // _AT_ONCE
    found = []
    for number in range(slices):
        within = []
        for shard in range(shards):
            hashes = _unsealed(folder, _hashes(shard), HASH)
            within.append(hashes[hashes["high"] % slices == number])
        found.append(_repeats(np.concatenate(within)))
    folder.write(FOUND, _sealed(np.sort(np.concatenate(found))))
    for shard in range(shards):
        folder.delete(_hashes(shard))


def _repeats(rows: np.ndarray) -> np.ndarray:
    """Places of the rows whose hash a row of an earlier place has too: int64 [n]."""
    rows = rows[np.lexsort((rows["place"], rows["low"], rows["high"]))]
    same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return rows["place"][1:][same]


def repeated(
    folder: Folder, data: TextData, split: Split, shard: int, shards: int
) -> frozenset[int]:
    """Numbers of the repeats in the source, or validation source, with number % shards == shard."""
    if not data.gates.drop_duplicates:
        return frozenset()
    places = _unsealed(folder, FOUND, np.dtype("<i8"))
    numbers = places[places >= 0] if split == "train" else places[places < 0] + _BEFORE
    return frozenset(numbers[numbers % shards == shard].tolist())


def _hashes(shard: int) -> str:
    return f"duplicates/{shard:05d}.hashes"


def _sealed(array: np.ndarray) -> bytes:
    content = array.tobytes()
    return hashlib.sha256(content).digest() + content


def _unsealed(folder: Folder, name: str, dtype: np.dtype) -> np.ndarray:
    content = b""
    with contextlib.suppress(FileNotFoundError):
        content = folder.read(name)
    seal, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != seal:
        folder.delete(name)
        raise UserError(
            f"The file {name} in {folder.path} was damaged and has been removed; run "
            "`flax-transformers prepare` with --begin, or without --shard, to make it again."
        )
    return np.frombuffer(body, dtype)
