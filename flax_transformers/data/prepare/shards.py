"""Tokenizes the shards of a token store, and verifies them against their checksums."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from flax_transformers.data.prepare.corpus import Corpus
from flax_transformers.data.prepare.duplicates import repeated
from flax_transformers.data.prepare.filters import let_in
from flax_transformers.data.prepare.labels import Labeller, kept_label_names
from flax_transformers.data.prepare.report import TextFindings
from flax_transformers.data.prepare.runner import read_record
from flax_transformers.data.prepare.shard_writer import ShardWriter
from flax_transformers.data.prepare.workers import Note, for_each_run
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.read import CorpusReader
from flax_transformers.data.sources.sharding import VERSION, runs
from flax_transformers.data.store.files import StoreReader, digest, record_json
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

    ``left_out``: number of documents that were left out, by reason; see `Counts`, also for ``cut``.
    ``tokenizers``: `TextFindings` of each tokenizer.
    """

    made_from: str
    left_out: dict[str, int]
    splits: dict[Split, ShardRecord]
    cut: int = 0
    tokenizers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreJob:
    """What tokenizing a shard takes. ``claimed`` is the record of `origin.claim`.

    ``target_tokenizer``: the tokenizer of the second side of pairs, if it is another one.
    """

    folder: Folder
    corpus: Corpus
    claimed: dict[str, Any]
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer | None = None

    @property
    def made_from(self) -> str:
        """What a shard has to be made from to count as finished."""
        target = self.target_tokenizer
        targets = "" if target is None else f", target tokenizer {target.fingerprint}"
        corpus = digest(self.claimed)
        made_of = f"tokenizer {self.tokenizer.fingerprint}, corpus {corpus}{targets}"
        return f"format {FORMAT}, {made_of}, dealt as in version {VERSION}"

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, or of the larger of two."""
        target = self.target_tokenizer
        size = self.tokenizer.vocabulary.size
        return size if target is None else max(size, target.vocabulary.size)

    def encoded(
        self, documents: Iterable[tuple[int, Document]], counts: Counts
    ) -> Iterator[list[tuple[Document, list[np.ndarray]]]]:
        """Numbered documents with their token ids; see `encode_documents`. ``counts`` is for
        documents that turn out to be invalid."""
        return encode_documents(documents, self.tokenizer, self.target_tokenizer)


def finished_shards(job: StoreJob, shards: Sequence[int] | None = None) -> dict[int, FinishedShard]:
    """The finished ones of ``shards``, default all, by number. Shards made with another tokenizer
    or from another corpus do not count."""
    found = {}
    made_from = job.made_from
    for shard in range(job.corpus.shards) if shards is None else shards:
        record = read_record(job.folder, _record_name(shard), made_from)
        try:
            if record is not None:
                splits = {split: ShardRecord.from_json(record["splits"][split]) for split in SPLITS}
                found[shard] = FinishedShard(**{**record, "splits": splits})
        except (ValueError, TypeError, KeyError, AttributeError):  # damaged: not finished
            continue
    return found


def all_finished(job: StoreJob) -> bool:
    """Whether all shards are finished. Reads no record if one is missing."""
    names = set(job.folder.names("shards/"))
    if not all(_record_name(shard) in names for shard in range(job.corpus.shards)):
        return False
    return len(finished_shards(job)) == job.corpus.shards


def _record_name(shard: int) -> str:
    return f"shards/{shard:05d}.json"


def write_shards(job: StoreJob, shards: Sequence[int], processes: int) -> None:
    """Writes those of ``shards`` that are missing."""
    finished = finished_shards(job, shards)
    missing = [shard for shard in shards if shard not in finished]
    work = partial(tokenize_run, job)
    parts = runs(missing, job.corpus.tied_shards(), processes) if missing else []
    for_each_run(work, parts, processes, done="tokenized", total=len(shards))


def checked_shards(
    job: StoreJob, processes: int
) -> tuple[list[FinishedShard], dict[Split, np.ndarray]]:
    """All shards, with every file verified against its checksum, and how often each id occurs in
    each split.

    A shard whose files do not match its record is written once more.
    """
    job.folder.sync()
    finished = finished_shards(job)
    damaged, unigrams = _checked(job, finished)
    if damaged:
        for shard, error in damaged.items():
            print(f"Tokenizing shard {shard + 1} again: {error}", file=sys.stderr)
            job.folder.delete(_record_name(shard))
        write_shards(job, range(job.corpus.shards), processes)
        job.folder.sync()
        finished = finished_shards(job)
        damaged, unigrams = _checked(job, finished)
        for error in damaged.values():
            raise error
    return [finished[shard] for shard in range(job.corpus.shards)], unigrams


def _checked(
    job: StoreJob, finished: Mapping[int, FinishedShard]
) -> tuple[dict[int, UserError], dict[Split, np.ndarray]]:
    """The errors of damaged shards, and how often each id occurs in each split."""
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
    """Counts ids while several threads read files."""

    def __init__(self, vocab_size: int) -> None:
        self.counts: dict[Split, np.ndarray] = {
            split: np.zeros(vocab_size, np.int64) for split in SPLITS
        }
        self._lock = threading.Lock()

    def add(self, name: str, values: np.ndarray) -> None:
        """Counts the values of a file of tokens, all of which are ids."""
        if not name.endswith(".tokens"):
            return
        split = next(split for split in SPLITS if name.startswith(f"{split}/"))
        with self._lock:
            add_counts(self.counts[split], values)


def tokenize_run(job: StoreJob, run: Sequence[int], note: Note) -> None:
    """Writes some shards, in order, in one pass over what they contain."""
    readers = job.corpus.readers(run)
    for shard in run:
        tokenize_shard(job, shard, readers, note)
        note(shards=1)


def tokenize_shard(
    job: StoreJob, shard: int, readers: Mapping[Split, CorpusReader], note: Note
) -> None:
    """Writes one shard of both splits, and its record last."""
    corpus, tokenizer, counts = job.corpus, job.tokenizer, Counts()
    train, validation = (
        ShardWriter(job.folder, split, shard, job.vocab_size, corpus.source.label_kind)
        for split in SPLITS
    )
    names = kept_label_names(job.folder)
    findings = _Findings(job)
    with train, validation:
        for split, reader in readers.items():
            documents = let_in(
                reader.documents(shard, counts),
                corpus.filters,
                counts,
                repeated(job.folder, corpus, split, shard),
            )
            labeller = Labeller(reader.source, names, tokenizer, counts)
            for chunk in job.encoded(documents, counts):
                tokens = 0
                for document, sentences in chunk:
                    held_out = split == "validation" or corpus.holds_out(document)
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
    job.folder.write(_record_name(shard), record_json(asdict(finished)), lasting=False)


class _Findings:
    """What the tokenizers of a job found in documents; the sides of pairs may have one each."""

    def __init__(self, job: StoreJob) -> None:
        target = job.target_tokenizer
        self._source = TextFindings(job.tokenizer)
        self._target = None if target is None else TextFindings(target)

    def add(self, chunk: Sequence[tuple[Document, list[np.ndarray]]]) -> None:
        """Adds documents with the ids of their sentences."""
        if self._target is None:
            ids = [one for _, sentences in chunk for one in sentences]
            self._source.add((document.whole.replace("\0", "") for document, _ in chunk), ids)
            return
        whole = [(document.text, sides) for document, sides in chunk if sides]
        for side, findings in enumerate((self._source, self._target)):
            findings.add([texts[side] for texts, _ in whole], [ids[side] for _, ids in whole])

    def records(self) -> dict[str, Any]:
        """The findings by the names of the tokenizers' folders."""
        target = {} if self._target is None else {TARGET: self._target.record()}
        return {"tokenizer": self._source.record(), **target}


def _add(
    writer: ShardWriter, document: Document, sentences: Sequence[np.ndarray], labeller: Labeller
) -> int:
    labels = labeller.arrays(document, scored=writer.split == "validation")
    return 0 if labels is None else writer.add_document(sentences, labels)
