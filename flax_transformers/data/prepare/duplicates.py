"""Finds documents that repeat an earlier one, in one pass over the corpus and in bounded memory.

First the 128-bit hashes of the documents of each shard are written, in any order and by any
process; then equal hashes are searched, a slice of all hashes at a time, and the repeats of each
shard written. The first occurrence in the corpus is kept, so the result depends on the corpus only.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from flax_transformers.data.prepare.corpus import Corpus
from flax_transformers.data.prepare.filters import let_in
from flax_transformers.data.prepare.workers import Note, for_each_run
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.read import CorpusReader
from flax_transformers.data.sources.sharding import runs
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder

FOUND = "duplicates/by_shard"
"""The last file written. Versions that sharded documents differently used another name."""
HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])
_BEFORE = 1 << 62  # positions of validation documents are negative, so that they come first
_OF_SHARD = 1 << 40  # a position is the shard's number times this, plus the number in the shard
_NOTED = 1000  # documents between progress reports
_AT_ONCE = 1 << 24  # hashes compared at once: about 800 MB with temporary arrays


def hash_shards(folder: Folder, corpus: Corpus, processes: int) -> None:
    """Writes the hashes of the documents of the shards that have none yet."""
    missing = [shard for shard in range(corpus.shards) if not folder.exists(_hashes(shard))]
    work, parts = partial(_hash_run, folder, corpus), runs(missing, corpus.tied_shards(), processes)
    for_each_run(work, parts, processes, done="hashed", total=corpus.shards)


def _hash_run(folder: Folder, corpus: Corpus, run: Sequence[int], note: Note) -> None:
    readers = sorted(corpus.readers(run).items(), reverse=True)  # validation first
    for shard in run:
        rows = (
            row
            for split, reader in readers
            for row in _rows(reader, corpus, shard, shard * _OF_SHARD - _before(split), note)
        )
        folder.write(_hashes(shard), _sealed(np.fromiter(rows, HASH)), lasting=False)
        note(shards=1)


def _rows(
    reader: CorpusReader, corpus: Corpus, shard: int, first: int, note: Note
) -> Iterator[tuple[int, int, int]]:
    documents = let_in(reader.documents(shard, Counts()), corpus.filters, Counts())
    for count, (number, document) in enumerate(documents, 1):
        yield *_hash(document), first + number
        if count % _NOTED == 0:
            note(_NOTED)


def _hash(document: Document) -> tuple[int, int]:
    """A 128-bit hash of the text, with each run of whitespace as one space, and of the labels, or
    of the answers to a question."""
    texts = [document.text] if isinstance(document.text, str) else document.text
    content = "\0".join(" ".join(text.split()) for text in texts)
    given = document.labels or getattr(document, "answers", ())
    labels = repr(given) if given else ""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(content.encode("utf-8", "surrogatepass"))
    digest.update(f"\0\0{labels}".encode())
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def find_duplicates(folder: Folder, shards: int) -> None:
    """Compares the hashes of all shards and writes which documents are repeats."""
    documents = sum(len(_unsealed(folder, _hashes(shard), HASH)) for shard in range(shards))
    slices = 1 + documents // _AT_ONCE
    found = []
    for number in range(slices):
        within = []
        for shard in range(shards):
            hashes = _unsealed(folder, _hashes(shard), HASH)
            within.append(hashes[hashes["high"] % slices == number])
        found.append(_repeats(np.concatenate(within)))
    repeats = np.sort(np.concatenate(found))
    for shard in range(shards):
        mine = [_of_shard(repeats, shard, before) for before in (_BEFORE, 0)]
        folder.write(_repeats_of(shard), _sealed(np.concatenate(mine)), lasting=False)
    folder.write(FOUND, f"{len(repeats)}\n".encode())
    for shard in range(shards):
        folder.delete(_hashes(shard))


def _of_shard(positions: np.ndarray, shard: int, before: int) -> np.ndarray:
    """The positions, which are sorted, that belong to a shard."""
    borders = np.array([shard, shard + 1], np.int64) * _OF_SHARD - before
    first, end = np.searchsorted(positions, borders)
    return positions[first:end]


def _repeats(rows: np.ndarray) -> np.ndarray:
    """Positions of the documents whose hash occurs at an earlier position: int64 [n]."""
    rows = rows[np.lexsort((rows["position"], rows["low"], rows["high"]))]
    same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return rows["position"][1:][same]


def _before(split: Split) -> int:
    return 0 if split == "train" else _BEFORE


def repeated(folder: Folder, corpus: Corpus, split: Split, shard: int) -> frozenset[int]:
    """The numbers of the repeats in a shard of the source or the validation source."""
    if not corpus.filters.drop_duplicates:
        return frozenset()
    try:
        positions = _unsealed(folder, _repeats_of(shard), np.dtype("<i8"))
    except UserError:
        folder.delete(FOUND)
        raise
    mine = positions[(positions >= 0) == (split == "train")]
    return frozenset((mine + _before(split) - shard * _OF_SHARD).tolist())


def _hashes(shard: int) -> str:
    return f"duplicates/{shard:05d}.of_documents"


def _repeats_of(shard: int) -> str:
    return f"duplicates/{shard:05d}.repeats"


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
            "`flax-transformers prepare` with --begin, or without --shard, to write it again."
        )
    return np.frombuffer(body, dtype)
