"""The token store: a tokenized corpus as flat arrays with random access.

A store is a folder. Each split ("train", "validation") is a sequence of shards, and each shard has
flat little-endian files: ``tokens`` (uint16, or uint32 above 65,536 ids), ``documents`` and
``sentences`` (int64, the positions in the shard at which they end). A split has ``unigrams`` (int64
[vocabulary], the number of occurrences of each id); in format 1 every shard has. If the sides of
pairs have two vocabularies, the dtype and size are those of the larger, and ids of both sides are
counted together. Labelled documents add ``labels`` or ``tags`` (int32) or ``numbers`` (float32),
and ``label_ends`` (int64, where the entries of a document end); questions also add ``records``
(bytes) and ``record_ends``.
``manifest.json``, written last, contains counts and checksums: a folder without it is not finished.
Readers see one array of tokens per split, in global positions, and no shards.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from flax_transformers.data.sources.documents import LabelKind
from flax_transformers.data.store.files import (
    DIGEST,
    Content,
    StoreArray,
    StoreFiles,
    StoreReader,
    digest,
    sealed,
)
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import FileRecord, record_of
from flax_transformers.storage.folders import Folder, LocalFolder, open_folder

FORMAT = 2
"""Of new stores. In format 1 every sentence was tokenized separately, so the ids of byte-level BPE
and sentencepiece differ from those of the whole text; such stores can still be read."""
MANIFEST = "manifest.json"
KIND = "token store"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
UNIGRAMS = "unigrams"
TEXT_KINDS = ("tokens", "documents", "sentences")
"""Files that every shard has."""
_AT_ONCE = 1 << 22  # ends read
_COUNTED = 1 << 16  # fewest tokens counted at once, whose copies stay in a core's cache
_BUCKET_THREADS = 16  # concurrent reads per process over a network
LABEL_DTYPES = {
    "labels": "<i4", "tags": "<i4", "numbers": "<f4", "choices": "<i4", "records": "u1",
}  # fmt: skip
LABELS: dict[LabelKind | None, tuple[str, ...]] = {
    None: (),
    "classes": ("labels", "label_ends"),
    "tags": ("tags", "label_ends"),
    "numbers": ("numbers", "label_ends"),
    "choices": ("choices", "label_ends"),
    "spans": ("labels", "label_ends", "records", "record_ends"),
}
"""Additional files for each kind of labels."""


@dataclass(frozen=True)
class ShardRecord:
    """Counts of one shard of one split, and its ``files`` by name relative to the store.

    ``skipped`` documents without tokens are not among ``documents``.
    """

    tokens: int
    documents: int
    sentences: int
    skipped: int
    files: dict[str, FileRecord]

    @property
    def labels(self) -> int:
        """Number of labels of its documents."""
        kinds = LABEL_DTYPES.keys() - {"records"}
        found = (r.bytes for name, r in self.files.items() if name.rpartition(".")[2] in kinds)
        return sum(found) // 4

    @staticmethod
    def from_json(record: dict[str, Any]) -> ShardRecord:
        files = {name: FileRecord(**file) for name, file in record["files"].items()}
        return ShardRecord(**{**record, "files": files})

    def contents(self, vocab_size: int, classes: int = 0) -> StoreFiles:
        """The content of each of its files, for `StoreReader`. ``classes``: their number, if labels
        are classes."""
        by_kind = {name.rpartition(".")[2]: name for name in self.files}
        records = self.files[by_kind["records"]].bytes if "records" in by_kind else 0
        below = classes if classes and "records" not in by_kind else None
        known = {
            "tokens": Content(token_dtype(vocab_size), self.tokens, below=vocab_size),
            "documents": Content("<i8", self.documents, last=self.tokens, strictly=True),
            "sentences": Content("<i8", self.sentences, last=self.tokens, strictly=True),
            "unigrams": Content("<i8", vocab_size, below=self.tokens + 1),
            "labels": Content(LABEL_DTYPES["labels"], below=below),
            "tags": Content(LABEL_DTYPES["tags"], below=below),
            "numbers": Content(LABEL_DTYPES["numbers"]),
            "choices": Content(LABEL_DTYPES["choices"]),
            "records": Content(LABEL_DTYPES["records"]),
            "label_ends": Content("<i8", self.documents, last=self.labels),
            "record_ends": Content("<i8", self.documents, last=records),
        }
        return {name: (self.files[name], known[kind]) for kind, name in by_kind.items()}


def shard_file(split: Split, shard: int, kind: str) -> str:
    """The name of a file of a shard, relative to the store."""
    return f"{split}/{shard:05d}.{kind}"


def token_dtype(vocab_size: int) -> str:
    """uint16 if every id fits, else uint32; little-endian."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_manifest(
    folder: Folder,
    shards: dict[Split, list[ShardRecord]],
    *,
    vocab_size: int,
    tokenizer: str,
    corpus: dict[str, Any],
    left_out: dict[str, int] | None = None,
    label_names: Sequence[str] = (),
    target_tokenizer: str | None = None,
    unigrams: Mapping[Split, np.ndarray] | None = None,
) -> None:
    """Finishes the store in a folder. ``tokenizer``, ``target_tokenizer``: fingerprints;
    ``corpus``: the record of `origin.claim`; ``left_out``: number of documents that were left out,
    by reason; ``unigrams``: number of occurrences of each id, int64 [vocab_size]."""
    counted = {split: counts.astype("<i8").tobytes() for split, counts in (unigrams or {}).items()}
    for split, content in counted.items():
        folder.write(f"{split}/{UNIGRAMS}", content)
    body = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "corpus": corpus,
        "left_out": left_out or {},
        "splits": {split: [asdict(shard) for shard in shards[split]] for split in SPLITS},
        **({"label_names": list(label_names)} if label_names else {}),
        **({} if target_tokenizer is None else {"target_tokenizer": target_tokenizer}),
        UNIGRAMS: {split: asdict(record_of([content])) for split, content in counted.items()},
    }
    folder.write(MANIFEST, sealed(body))


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest, verified. Raises UserError if it is missing or damaged."""
    return StoreReader(folder, KIND).manifest(MANIFEST, FORMAT, also=(1,))


class TokenStore:
    """Random access to one split of a store, in global positions 0 .. num_tokens.

    Opening reads the manifest and compares sizes (`verify` reads the rest); arrays are opened on
    first use, so that pickles are small. ``tokenizer``, ``target_tokenizer``: fingerprints that the
    store must have been made with. Tokens are read as byte ranges; from a bucket, the ends of
    documents and sentences are read at once.

    Raises UserError for a missing, damaged or truncated store, another format, another tokenizer.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: Split = "train",
        *,
        tokenizer: str | None = None,
        target_tokenizer: str | None = None,
    ) -> None:
        self._reader = StoreReader(open_folder(directory), KIND)
        self.split = split
        manifest = read_manifest(self._reader.folder)
        given = {"tokenizer": tokenizer, "target_tokenizer": target_tokenizer}
        for name, asked in given.items():
            if asked not in (None, manifest.get(name)):
                raise UserError(
                    f"The token store in {self.directory} was made with {name.replace('_', ' ')} "
                    f"{str(manifest.get(name))[:12]}, not with {str(asked)[:12]}; use the one "
                    "saved inside the store, or prepare another store."
                )
        try:
            self._read_records(manifest)
            self._reader.check_sizes(self._files)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._reader.damaged(MANIFEST, f"an entry is not valid: {error}") from error

    def _read_records(self, manifest: dict[str, Any]) -> None:
        split = self.split
        self.tokenizer: str = manifest["tokenizer"]
        self.vocab_size: int = manifest["vocab_size"]
        self.corpus: dict[str, Any] = manifest["corpus"]
        self.label_names: tuple[str, ...] = tuple(manifest.get("label_names", ()))
        self._shards = [ShardRecord.from_json(record) for record in manifest["splits"][split]]
        hashes = {n: file.sha256 for shard in self._shards for n, file in shard.files.items()}
        self.fingerprint: str = digest({"files": hashes, "label_names": self.label_names})
        """Hash of the names and bytes of the split's files, without what they were made from."""
        self.former_fingerprint: str = digest({"store": manifest[DIGEST], "split": split})
        """The fingerprint in checkpoints of earlier versions."""
        self.num_tokens = sum(shard.tokens for shard in self._shards)
        self.num_documents = sum(shard.documents for shard in self._shards)
        self.num_sentences = sum(shard.sentences for shard in self._shards)
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in self._shards)]
        self.num_labels = sum(shard.labels for shard in self._shards)
        self.label_kind = _label_kind(self._shards[0])
        self._first_documents = [0, *itertools.accumulate(s.documents for s in self._shards)][:-1]
        self._arrays: dict[tuple[str, int], StoreArray] = {}
        counted = manifest.get(UNIGRAMS, {}).get(split)
        self._unigrams = None if counted is None else FileRecord(**counted)

    @property
    def _files(self) -> StoreFiles:
        classes = len(self.label_names)
        files = [shard.contents(self.vocab_size, classes) for shard in self._shards]
        found = {name: file for shard in files for name, file in shard.items()}
        if self._unigrams is not None:
            counts = Content("<i8", self.vocab_size, below=self.num_tokens + 1)
            found[f"{self.split}/{UNIGRAMS}"] = self._unigrams, counts
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    @property
    def directory(self) -> str:
        """Absolute path or URL of the store."""
        return self._reader.folder.path

    @property
    def is_local(self) -> bool:
        """Whether the store is on a local disk, where reads are fast."""
        return isinstance(self._reader.folder, LocalFolder)

    @property
    def read_threads(self) -> int:
        """Threads for concurrent reads of examples; see `Examples`."""
        return 0 if self.is_local else _BUCKET_THREADS

    def verify(self) -> None:
        """Reads the whole split and compares checksums. Raises UserError naming a damaged file."""
        self._reader.check_contents(self._files)

    def verify_on_opening(self, number: int = 0, of: int = 1) -> None:
        """`verify` on a local disk; in a bucket, which every process would have to download, only
        compares sizes. ``of`` processes verify a share each, ``number`` from 0. Raises UserError
        naming a damaged file."""
        files = self._files
        by_size = sorted(files, key=lambda name: (files[name][0].bytes, name))
        chosen = {name: files[name] for name in by_size[number::of]}
        if self.is_local:
            self._reader.check_contents(chosen)
        else:
            self._reader.check_remote_sizes(chosen)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Token ids [start, start + length) as a new int32 array [length], across shards.

        Raises IndexError outside of the split.
        """
        stop = start + length
        if start < 0 or length < 0 or stop > self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.num_tokens}")
        shard = max(0, bisect.bisect_right(self._starts, start) - 1)
        parts = []
        while start < stop:
            first, end = self._starts[shard], min(stop, self._starts[shard + 1])
            if start < end:
                parts.append(self._read_tokens(shard, start - first, end - first))
            start, shard = max(start, end), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts])

    def _read_tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._array("tokens", shard).read(start, stop).astype(np.int32)

    def _array(self, kind: str, shard: int) -> StoreArray:
        array = self._arrays.get((kind, shard))
        if array is None:
            name = shard_file(self.split, shard, kind)
            record, content = self._shards[shard].contents(self.vocab_size)[name]
            length = record.bytes // np.dtype(content.dtype).itemsize
            whole = not self.is_local and kind != "tokens"
            array = self._reader.array(name, content.dtype, length, in_memory=whole)
            self._arrays[kind, shard] = array
        return array

    def labels(self, document: int) -> np.ndarray:
        """The labels of a document by its index, int32 or float32 [n]."""
        return self._of_document(LABELS[self.label_kind][0], document)

    @property
    def all_labels(self) -> np.ndarray:
        """The labels of all documents in order: int32 or float32 [n]."""
        kind, shards = LABELS[self.label_kind][0], enumerate(self._shards)
        arrays = [self._array(kind, number) for number, shard in shards if shard.documents]
        return np.concatenate([array.read(0, len(array)) for array in arrays])

    def record(self, document: int) -> bytes:
        """The record of a document, such as `Question.record`."""
        return self._of_document("records", document).tobytes()

    def _of_document(self, kind: str, document: int) -> np.ndarray:
        shard = bisect.bisect_right(self._first_documents, document) - 1
        place = document - self._first_documents[shard]
        ends = self._array("record_ends" if kind == "records" else "label_ends", shard)
        start = int(ends[place - 1]) if place else 0
        return np.array(self._array(kind, shard).read(start, int(ends[place])))

    def document_ends_within(self, start: int, stop: int) -> np.ndarray:
        """Global positions e, start < e <= stop, at which a document ends: int64 [k]."""
        return self._ends_within("documents", start, stop)

    def sentence_ends_within(self, start: int, stop: int) -> np.ndarray:
        """Global positions e, start < e <= stop, at which a sentence ends: int64 [k]."""
        return self._ends_within("sentences", start, stop)

    def document_of(self, position: int) -> int:
        """The index of the document that contains the token at a global position."""
        shard = max(0, bisect.bisect_right(self._starts, position) - 1)
        ends = self._array("documents", shard)
        return self._first_documents[shard] + ends.count_up_to(position - self._starts[shard])

    def _ends_within(self, kind: str, start: int, stop: int) -> np.ndarray:
        shard = max(0, bisect.bisect_right(self._starts, start) - 1)
        found = []
        while shard < len(self._shards) and self._starts[shard] < stop:
            ends, first = self._array(kind, shard), self._starts[shard]
            found.append(ends.between(start - first, stop - first) + first)
            shard += 1
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])

    @property
    def document_ends(self) -> np.ndarray:
        """Global positions at which documents end, increasing: int64 [num_documents]."""
        return self._global_ends("documents")

    @property
    def sentence_ends(self) -> np.ndarray:
        """Global positions at which sentences end, document ends included: int64 [S]."""
        return self._global_ends("sentences")

    def _global_ends(self, kind: str) -> np.ndarray:
        ends, place = np.zeros(sum(getattr(s, kind) for s in self._shards), np.int64), 0
        for block in self.ends_in_blocks(kind, _AT_ONCE):
            ends[place : place + len(block)] = block
            place += len(block)
        return ends

    def ends_in_blocks(self, kind: str, size: int) -> Iterator[np.ndarray]:
        """All ends of "documents" or "sentences", as in `document_ends`, int64 [1 .. ``size``]."""
        for shard, first in enumerate(self._starts[:-1]):
            array = self._array(kind, shard)
            for start in range(0, len(array), size):
                yield array.read(start, min(start + size, len(array))) + first

    @property
    def unigram_counts(self) -> np.ndarray:
        """Number of occurrences of each id: int64 [vocab_size]."""
        if self._unigrams is not None:
            name = f"{self.split}/{UNIGRAMS}"
            return self._reader.array(name, "<i8", self.vocab_size).read(0, self.vocab_size)
        counts = np.zeros(self.vocab_size, np.int64)
        for shard, record in enumerate(self._shards):
            if shard_file(self.split, shard, UNIGRAMS) in record.files:
                counts += self._array(UNIGRAMS, shard).read(0, self.vocab_size)
            else:
                add_counts(counts, self._array("tokens", shard).read(0, record.tokens))
        return counts


def add_counts(counts: np.ndarray, tokens: np.ndarray) -> None:
    """Adds the number of occurrences of each id to ``counts``, int64 [vocabulary], in blocks."""
    step = max(_COUNTED, 4 * len(counts))
    for start in range(0, len(tokens), step):
        counts += np.bincount(tokens[start : start + step], minlength=len(counts))


def _label_kind(shard: ShardRecord) -> LabelKind | None:
    """The kind of labels of a shard's documents; None without labels."""
    kinds = {name.rpartition(".")[2] for name in shard.files}
    if "records" in kinds:
        return "spans"
    return next((kind for kind, names in LABELS.items() if names and names[0] in kinds), None)
