"""Tokenises the shards of a store, and reads them again to compare them with their digests."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from flax_transformers.data.config import TextData
from flax_transformers.data.prepare.duplicates import repeated
from flax_transformers.data.prepare.filters import let_in
from flax_transformers.data.prepare.labels import Labeller, kept_label_names
from flax_transformers.data.prepare.report import TextFindings
from flax_transformers.data.prepare.shard_writer import ShardWriter
from flax_transformers.data.prepare.workers import Note, for_each_run
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.read import CorpusReader, tied_shards
from flax_transformers.data.sources.sharding import DEALING, runs
from flax_transformers.data.store.files import StoreReader, to_json
from flax_transformers.data.store.token_store import (
    FORMAT,
    KIND,
    SPLITS,
    ShardRecord,
    Split,
    add_counts,
)
from flax_transformers.data.store.tokenizer import TARGET
from flax_transformers.data.tokenizers.encoding import encode_documents
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder


@dataclass(frozen=True)
class FinishedShard:
    """One shard of every split. ``made_from`` is `StoreJob.made_from`.

    ``left_out``: how many documents were not let in, by reason; see `Counts`. ``cut``: as there.
    ``tokenizers``: `TextFindings` of each tokenizer.
    """

    made_from: str
    left_out: dict[str, int]
    splits: dict[Split, ShardRecord]
    cut: int = 0
    tokenizers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreJob:
    """All that tokenising a shard takes; ``corpus`` is what the store was claimed for.

    ``target_tokenizer`` is that of the second side of pairs, where it is another one.
    """

    folder: Folder
    data: TextData
    corpus: str
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer | None = None

    @property
    def made_from(self) -> str:
        """What a shard has to be made from to count as finished."""
        target = self.target_tokenizer
        targets = "" if target is None else f", target tokenizer {target.fingerprint}"
        made_of = f"tokenizer {self.tokenizer.fingerprint}, corpus {self.corpus}{targets}"
        return f"format {FORMAT}, {made_of}, dealt as in version {DEALING}"

    @property
    def vocab_size(self) -> int:
        """Of the larger vocabulary, where there are two."""
        target = self.target_tokenizer
        size = self.tokenizer.vocabulary.size
        return size if target is None else max(size, target.vocabulary.size)


def finished_shards(job: StoreJob, shards: Sequence[int] | None = None) -> dict[int, FinishedShard]:
    """Those of ``shards``, by default all, that are done, by number; those of another tokenizer or
    corpus are not."""
    found = {}
    for shard in range(job.data.shards) if shards is None else shards:
        try:
            record = json.loads(job.folder.read(_record_name(shard)))
            splits = {split: ShardRecord.from_json(record["splits"][split]) for split in SPLITS}
            finished = FinishedShard(**{**record, "splits": splits})
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent or damaged: not done
            continue
        if finished.made_from == job.made_from:
            found[shard] = finished
    return found


def all_finished(job: StoreJob) -> bool:
    """Whether all shards are done. Reads no record where one is missing."""
    names = set(job.folder.names("shards/"))
    if not all(_record_name(shard) in names for shard in range(job.data.shards)):
        return False
    return len(finished_shards(job)) == job.data.shards


def _record_name(shard: int) -> str:
    return f"shards/{shard:05d}.json"


def write_shards(job: StoreJob, shards: Sequence[int], processes: int) -> None:
    """Brings those of ``shards`` into being that are missing."""
    finished = finished_shards(job, shards)
    missing = [shard for shard in shards if shard not in finished]
    work = partial(tokenise_run, job)
    dealt = runs(missing, tied_shards_of(job.data), processes) if missing else []
    for_each_run(work, dealt, processes, done="tokenised", total=len(shards))


def tied_shards_of(data: TextData) -> list[bool]:
    """Of every shard, whether writing it takes reading over the one before in either source."""
    tied = tied_shards(data.source, data.shards)
    if data.validation_source is not None:
        also = tied_shards(data.validation_source, data.shards)
        tied = [one or other for one, other in zip(tied, also, strict=True)]
    return tied


def checked_shards(
    job: StoreJob, processes: int
) -> tuple[list[FinishedShard], dict[Split, np.ndarray]]:
    """All shards, after every file was read again and compared with its digest, and how often each
    id occurs in each split.

    A finished shard whose files do not agree with its record is made once more.
    """
    job.folder.sync()
    finished = finished_shards(job)
    damaged, unigrams = _checked(job, finished)
    if damaged:
        for shard, error in damaged.items():
            print(f"Tokenising shard {shard + 1} again: {error}", file=sys.stderr)
            job.folder.delete(_record_name(shard))
        write_shards(job, range(job.data.shards), processes)
        job.folder.sync()
        finished = finished_shards(job)
        damaged, unigrams = _checked(job, finished)
        for error in damaged.values():
            raise error
    return [finished[shard] for shard in range(job.data.shards)], unigrams


def _checked(
    job: StoreJob, finished: Mapping[int, FinishedShard]
) -> tuple[dict[int, UserError], dict[Split, np.ndarray]]:
    """What is wrong with damaged shards, and how often each id occurs in each split."""
    classes = len(kept_label_names(job.folder))
    owners, files = {}, {}
    for shard, record in finished.items():
        for split in SPLITS:
            for name, file in record.splits[split].contents(job.vocab_size, classes).items():
                owners[name], files[name] = shard, file
    counter = _UnigramCounter(job.vocab_size)
    problems = StoreReader(job.folder, KIND).problems(files, counter.add)
    return {owners[name]: error for name, error in problems}, counter.counts


class _UnigramCounter:
    """Counts ids while files are read, by several threads."""

    def __init__(self, vocab_size: int) -> None:
        self.counts: dict[Split, np.ndarray] = {
            split: np.zeros(vocab_size, np.int64) for split in SPLITS
        }
        self._lock = threading.Lock()

    def add(self, name: str, values: np.ndarray) -> None:
        """Counts the values if the file holds tokens; other ids than there are do not count."""
        if not name.endswith(".tokens"):
            return
        split = next(split for split in SPLITS if name.startswith(f"{split}/"))
        counts = np.zeros_like(self.counts[split])
        add_counts(counts, values[values < len(counts)])
        with self._lock:
            self.counts[split] += counts


def tokenise_run(job: StoreJob, run: Sequence[int], note: Note) -> None:
    """Writes some shards, in order, reading what they hold in one pass."""
    data = job.data
    readers: dict[Split, CorpusReader] = {"train": CorpusReader(data.source, run, data.shards)}
    if data.validation_source is not None:
        readers["validation"] = CorpusReader(data.validation_source, run, data.shards)
    for shard in run:
        tokenise_shard(job, shard, readers, note)
        note(shards=1)


def tokenise_shard(
    job: StoreJob, shard: int, readers: Mapping[Split, CorpusReader], note: Note
) -> None:
    """Writes one shard of both splits, and its record last.

    ``readers`` are those of the source, and of the validation source if there is one.
    """
    data, tokenizer = job.data, job.tokenizer
    counts = Counts()
    fraction = data.held_out_fraction
    train, validation = (
        ShardWriter(job.folder, split, shard, job.vocab_size, data.source.label_kind)
        for split in SPLITS
    )
    names = kept_label_names(job.folder)
    findings = _Findings(job)
    with train, validation:
        for split, reader in readers.items():
            documents = let_in(
                reader.documents(shard, counts),
                data.filters,
                counts,
                repeated(job.folder, data, split, shard),
            )
            labeller = Labeller(reader.source, names, tokenizer, counts)
            for chunk in encode_documents(documents, tokenizer, job.target_tokenizer):
                tokens = 0
                for document, sentences in chunk:
                    held_out = split == "validation" or is_held_out(document, fraction)
                    writer = validation if held_out else train
                    tokens += _add(writer, document, sentences, labeller)
                findings.add(chunk)
                note(len(chunk), tokens)
        splits: dict[Split, ShardRecord] = {
            "train": train.finish(),
            "validation": validation.finish(),
        }
    left_out = counts.left_out()
    left_out["empty"] += sum(record.skipped for record in splits.values())
    finished = FinishedShard(job.made_from, left_out, splits, counts.cut, findings.records())
    job.folder.write(_record_name(shard), to_json(asdict(finished)), lasting=False)


class _Findings:
    """What the tokenizers of a job made of documents; the sides of pairs may have one each."""

    def __init__(self, job: StoreJob) -> None:
        target = job.target_tokenizer
        self._source = TextFindings(job.tokenizer)
        self._target = None if target is None else TextFindings(target)

    def add(self, chunk: Sequence[tuple[Document, list[np.ndarray]]]) -> None:
        """Documents with the ids of their sentences."""
        if self._target is None:
            ids = [one for _, sentences in chunk for one in sentences]
            self._source.add((document.whole.replace("\0", "") for document, _ in chunk), ids)
            return
        whole = [(document.text, sides) for document, sides in chunk if sides]
        for side, findings in enumerate((self._source, self._target)):
            findings.add([texts[side] for texts, _ in whole], [ids[side] for _, ids in whole])

    def records(self) -> dict[str, Any]:
        """By the names of the tokenizers' folders."""
        target = {} if self._target is None else {TARGET: self._target.record()}
        return {"tokenizer": self._source.record(), **target}


def _add(
    writer: ShardWriter, document: Document, sentences: Sequence[np.ndarray], labeller: Labeller
) -> int:
    labels = labeller.arrays(document, scored=writer.split == "validation")
    return 0 if labels is None else writer.add_document(sentences, labels)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document goes to "validation"; its group or text decides, not place or shard."""
    key = document.whole if document.group is None else document.group
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64
