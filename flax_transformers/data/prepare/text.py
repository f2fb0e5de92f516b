"""Text to token store: train or load the tokenizer once, then tokenise every shard once.

Every step ends in a rename and is skipped when found done, so a run that was killed resumes where
it stopped, and its store is byte for byte that of an uninterrupted run:

    corpus.json       what the store is made from; anything else is refused from then on
    duplicates/       only if they are to be dropped
    tokenizer/        trained on the training documents alone
    target_tokenizer/ only if the targets of pairs have one of their own
    labels.json       only if documents have labels with names
    shards/N.json     counts and digests of shard N, written when its files are in place
    report.json       what was left out or changed, for people
    manifest.json     last, after every file was read again and compared

How often the corpus is read does not depend on the number of shards: once to hash its content,
unless the cache has the hash (`content.content_digest`); once to tokenize it; once more for
duplicates, if they are to be dropped; as far as training a tokenizer asks for
(``training_documents``), and so for the targets' own; and to its end in that same pass if the
names of labels are not given. Before, the first few megabytes are read to see that there is text.

All before the shards is ``begin_text``. Then shards can be made by any number of processes on any
number of machines that share the folder (``prepare_shards``). ``prepare_text`` does it all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from flax_transformers.data.config import TextData
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.pipeline.pair_examples import PairExamples
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.data.prepare.cached_stores import (
    Tokenizers,
    beside_others,
    cache_directory,
    no_store,
)
from flax_transformers.data.prepare.duplicates import FOUND, find_duplicates, hash_shards, repeated
from flax_transformers.data.prepare.filters import let_in
from flax_transformers.data.prepare.labels import NAMES, LabelNames, has_names, kept_label_names
from flax_transformers.data.prepare.report import added_up, say_report, write_report
from flax_transformers.data.prepare.shards import (
    FinishedShard,
    StoreJob,
    all_finished,
    checked_shards,
    is_held_out,
    tied_shards_of,
    write_shards,
)
from flax_transformers.data.prepare.store_locks import (
    Compare,
    Corpus,
    claim,
    corpus_of,
    refuse_changed,
    refuse_other,
    require_unchanged,
)
from flax_transformers.data.prepare.workers import require_job
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.sharding import share
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Split,
    TokenStore,
    read_manifest,
    write_manifest,
)
from flax_transformers.data.store.tokenizer import TARGET, is_saved, own_tokenizer, save_tokenizer
from flax_transformers.data.tokenizers.facts import CONFIG_FILE
from flax_transformers.data.tokenizers.load import Tokenizer, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.labelled import LabelledSpec
from flax_transformers.objectives.sequence_to_sequence import PairSpec
from flax_transformers.storage.folders import Folder, open_folder
from flax_transformers.storage.locks import exclusive_lock, shared_lock

_LITTLE_TEXT = 8_000_000  # characters; starting processes takes longer than tokenising so much


@dataclass(frozen=True)
class PreparedText:
    """Text in a token store (a `Dataset`). ``validation`` is None where nothing is held out."""

    directory: str
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore | None
    target_tokenizer: Tokenizer | None = None
    known: Vocabulary | None = None
    """The part of the vocabulary that the run's model has, where that is not all (`fitting`)."""

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    @property
    def known_as(self) -> tuple[str, ...]:
        return (self.train.former_fingerprint,)

    @property
    def summary(self) -> str:
        held_out = self.validation.num_tokens if self.validation else 0
        target = self.target_tokenizer
        return (
            f"{self.train.num_tokens:,} training tokens in {self.train.num_documents:,} documents, "
            f"{held_out:,} held out, {self.tokenizer.kind} of {self.vocabulary.size:,} pieces"
            + (f", for targets {target.kind} of {target.vocabulary.size:,}" if target else "")
        )

    @property
    def vocabulary(self) -> Vocabulary:
        if self.known is not None:
            return self.known
        if self.target_tokenizer is None:
            return self.tokenizer.vocabulary
        return replace(self.tokenizer.vocabulary, target=self.target_tokenizer.vocabulary)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.train.label_names

    def examples(self, split: Split, spec: WindowSpec) -> Examples | None:
        store = self.train if split == "train" else self.validation
        if store is None:
            return None
        if isinstance(spec, PairSpec):
            return PairExamples(store, spec)
        if self.target_tokenizer is not None:
            raise UserError(
                f"The token store in {self.directory} has a tokenizer for sources and one for "
                "targets, which no objective but SequenceToSequence can take; choose that one, or "
                "leave out data.target_tokenizer."
            )
        if isinstance(spec, LabelledSpec):
            return LabelledExamples(store, spec)
        return TextExamples(store, spec)


def prepare_text(
    data: TextData,
    output: str | os.PathLike[str] | None = None,
    *,
    processes: int | None = None,
    tokenizer: Tokenizer | None = None,
    of_run: Tokenizers = MappingProxyType({}),
    compare: Compare = "sizes",
) -> PreparedText:
    """Makes the token store of ``data``, or opens it where it is finished.

    ``output`` goes before ``data.store``, ``processes`` before ``data.prepare_processes``, and a
    ``tokenizer`` before the one that would be made of ``data.tokenizer``. The tokenizers ``of_run``
    are used instead of training others, where the store has to be made. A finished store is enough;
    with ``compare`` a corpus that is at hand must have the same sizes, or content. Safe to kill at
    any time and to call again, also while another process does the same. Prints progress on stderr.
    Raises UserError for an empty corpus, nothing held out although asked for, a directory that
    holds another store, and a disk that is full or read-only.
    """
    folder, corpus = _folder(data, output, of_run), corpus_of(data)
    if folder.exists(MANIFEST):
        return _said(_open(folder, data, tokenizer, compare=compare))
    little = _check_beginning(data)
    processes = processes or data.prepare_processes or (1 if little else cores())
    with exclusive_lock(folder):
        made = not folder.exists(MANIFEST)
        if made:
            claimed = claim(folder, corpus)
            job = _begun(folder, data, claimed, processes, tokenizer, of_run)
            write_shards(job, range(data.shards), processes)
            _finish(job, corpus, claimed, processes)
    return _said(_open(folder, data, tokenizer, verified=made))


def _said(prepared: PreparedText) -> PreparedText:
    """Prints what the store's report has to say."""
    say_report(open_folder(prepared.directory))
    return prepared


def begin_text(
    data: TextData,
    output: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> None:
    """What has to be there before `prepare_shards`: the tokenizer, and which documents repeat."""
    folder = _folder(data, output)
    if not folder.exists(MANIFEST):
        little = _check_beginning(data)
        with exclusive_lock(folder):
            processes = data.prepare_processes or (1 if little else cores())
            _begun(folder, data, claim(folder, corpus_of(data)), processes, tokenizer)


def prepare_shards(
    data: TextData,
    output: str | os.PathLike[str] | None,
    job: int,
    jobs: int,
    *,
    tokenizer: Tokenizer | None = None,
) -> PreparedText | None:
    """One job's share of the store's shards, which are neighbours and so take one job's share of
    the corpus to read; see `dealing.share`.

    The job that finishes the last shard also finishes the store, and it is given out; before, None.
    A job may be killed and run again, or twice at once. Raises UserError where `begin_text` has not
    run, where there are more jobs than shards, and as `prepare_text` does.
    """
    require_job(job, jobs, data.shards)
    folder, corpus = _folder(data, output), corpus_of(data)
    if folder.exists(MANIFEST):
        return _said(_open(folder, data, tokenizer))
    processes = data.prepare_processes or cores()
    with shared_lock(folder):
        claimed = claim(folder, corpus, by_size=True)
        work = _store_job(folder, data, claimed, _begun_tokenizer(folder, data, tokenizer))
        write_shards(work, share(job, jobs, tied_shards_of(data)), processes)
    if not all_finished(work):
        return None
    with exclusive_lock(folder):
        made = not folder.exists(MANIFEST)
        if made:
            _finish(work, corpus, claimed, processes)
    return _said(_open(folder, data, tokenizer, verified=made))


def open_prepared(
    data: TextData,
    directory: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    of_run: Tokenizers = MappingProxyType({}),
) -> PreparedText:
    """The finished store of ``data``; reads nothing of the corpus where ``data.store`` is set.

    For several processes at once, none of which may start to write. Raises UserError where there
    is no finished store.
    """
    folder = _folder(data, directory, of_run)
    if not folder.exists(MANIFEST):
        raise UserError(no_store("token store", folder, data.tokenizer, of_run))
    return _open(folder, data, tokenizer)


def default_directory(data: TextData) -> str:
    """Below the user's cache directory, named after the corpus's content and the settings."""
    corpus = corpus_of(data)
    return cache_directory({"text": corpus}, lambda: corpus.identity)


def _folder(
    data: TextData,
    directory: str | os.PathLike[str] | None,
    of_run: Tokenizers = MappingProxyType({}),
) -> Folder:
    """Where the store is: as asked for, or else the default, but beside a store that was made with
    another tokenizer than that ``of_run``."""
    path = directory or data.store
    if path:
        return open_folder(path)
    return open_folder(beside_others(default_directory(data), of_run))


def _open(
    folder: Folder,
    data: TextData,
    given: Tokenizer | None,
    *,
    verified: bool = False,
    compare: Compare = "nothing",
) -> PreparedText:
    manifest = read_manifest(folder)
    made_from, corpus = manifest["corpus"], corpus_of(data)
    refuse_other(folder, made_from, corpus)
    refuse_changed(folder, made_from, corpus, compare)
    tokenizer = given or own_tokenizer(folder, data.tokenizer)
    target = _own_target_tokenizer(folder, data)
    if manifest["format"] < FORMAT and tokenizer.kind in ("unigram", "bpe"):
        print(
            f"The token store in {folder.path} has format {manifest['format']}: each sentence was "
            "tokenized apart, so its ids are not quite the tokenizer's own. Runs that began on it "
            "can use it; prepare another directory for new ones.",
            file=sys.stderr,
        )
    train, validation = (
        TokenStore(
            folder.path,
            split,
            tokenizer=tokenizer.fingerprint,
            target_tokenizer=None if target is None else target.fingerprint,
        )
        for split in SPLITS
    )
    if data.verify and not verified:
        train.verify_on_opening()
        validation.verify_on_opening()
    return PreparedText(
        folder.path, tokenizer, train, validation if validation.num_tokens else None, target
    )


def _check_beginning(data: TextData) -> bool:
    """Whether there is so little text that it could be read here; then checks that it will do."""
    for source in data.sources:
        sources.check_first_records(source)
    fraction, counts = data.held_out_fraction, Counts()
    characters = documents = held_out = 0
    for _, document in let_in(sources.read_documents(data.source), data.filters, counts):
        documents += 1
        held_out += is_held_out(document, fraction)
        characters += len(document.whole)
        if characters > _LITTLE_TEXT:
            return False
    _check_split(data, documents - held_out, held_out, counts.left_out())
    return True


def _check_split(data: TextData, train: int, held_out: int, left_out: dict[str, int]) -> None:
    path = data.source.path
    if train + held_out == 0:
        if any(left_out.values()):
            raise UserError(
                f"The corpus {path} is empty: no document is left ({_reasons(left_out)})."
            )
        raise UserError(f"The corpus {path} is empty: it holds no document with text.")
    if held_out == 0 and data.held_out_fraction > 0:
        raise UserError(
            f"validation_fraction {data.validation_fraction} holds out none of the {train} "
            f"documents of {path}; raise it, give a validation_source, or set it to 0."
        )
    if train == 0:
        raise UserError(
            f"validation_fraction {data.validation_fraction} holds out all {held_out} documents "
            f"of {path}; lower it."
        )


def _begun(
    folder: Folder,
    data: TextData,
    claimed: dict[str, Any],
    processes: int,
    given: Tokenizer | None,
    of_run: Tokenizers = MappingProxyType({}),
) -> StoreJob:
    """Makes what all shards need in a folder that is claimed; only one process may."""
    if given is None and data.tokenizer.needs_training:
        given = of_run.get("tokenizer")
    target, given_target = data.target_tokenizer, None
    if target is not None and target.needs_training:
        given_target = of_run.get(TARGET)
    if data.filters.drop_duplicates and not folder.exists(FOUND):
        hash_shards(folder, data, tied_shards_of(data), processes)
        find_duplicates(folder, data.shards)
    documents = _training_documents(folder, data)
    names = LabelNames(folder, data.source)
    if not is_saved(folder):
        texts = _texts(names.seen(documents), None if data.target_tokenizer is None else 0)
        save_tokenizer(folder, given or train_tokenizer(data.tokenizer, texts))
    if target is not None and not is_saved(folder, TARGET):
        texts = _texts(_training_documents(folder, data), 1)
        save_tokenizer(folder, given_target or train_tokenizer(target, texts), TARGET)
    names.keep(documents)
    tokenizer = own_tokenizer(folder, data.tokenizer, given)
    return _store_job(folder, data, claimed, tokenizer, given_target)


def _store_job(
    folder: Folder,
    data: TextData,
    claimed: dict[str, Any],
    tokenizer: Tokenizer,
    given_target: Tokenizer | None = None,
) -> StoreJob:
    target = _own_target_tokenizer(folder, data, given_target)
    return StoreJob(folder, data, digest(claimed), tokenizer, target)


def _texts(documents: Iterable[Document], side: int | None) -> Iterator[str]:
    """Texts to train a tokenizer on: one side of a pair, or both on lines of their own."""
    for document in documents:
        yield document.whole.replace("\0", "\n") if side is None else document.text[side]


def _training_documents(folder: Folder, data: TextData) -> Iterator[Document]:
    """The documents that nobody holds out."""
    reader = sources.CorpusReader(data.source, range(data.shards), data.shards)
    for shard in range(data.shards):
        repeats = repeated(folder, data, "train", shard)
        documents = let_in(reader.documents(shard, Counts()), data.filters, Counts(), repeats)
        for _, document in documents:
            if not is_held_out(document, data.held_out_fraction):
                yield document


def _begun_tokenizer(folder: Folder, data: TextData, given: Tokenizer | None) -> Tokenizer:
    """What ``begin_text`` left. What needs no training is also made here: it is always the same."""
    target = data.target_tokenizer
    wanted = [FOUND] if data.filters.drop_duplicates else []
    if given is None and data.tokenizer.needs_training:
        wanted.append(f"tokenizer/{CONFIG_FILE}")
    if target is not None and target.needs_training:
        wanted.append(f"{TARGET}/{CONFIG_FILE}")
    if has_names(data.source):
        wanted.append(NAMES)
    if not all(map(folder.exists, wanted)):
        raise UserError(
            f"The token store in {folder.path} is not begun; run `flax-transformers prepare` with "
            "the same config and --begin first, in one process."
        )
    if not is_saved(folder):
        save_tokenizer(folder, given or train_tokenizer(data.tokenizer, ()))
    if target is not None and not is_saved(folder, TARGET):
        save_tokenizer(folder, train_tokenizer(target, ()), TARGET)
    return own_tokenizer(folder, data.tokenizer, given)


def _own_target_tokenizer(
    folder: Folder, data: TextData, given: Tokenizer | None = None
) -> Tokenizer | None:
    """The store's own tokenizer of targets, where they have one."""
    config = data.target_tokenizer
    return None if config is None else own_tokenizer(folder, config, given, name=TARGET)


def _finish(job: StoreJob, corpus: Corpus, claimed: dict[str, Any], processes: int) -> None:
    """Reads all shards again and makes a store of the folder, if the corpus is what it was."""
    folder, data, target = job.folder, job.data, job.target_tokenizer
    finished, unigrams = checked_shards(job, processes)
    shards = {split: [shard.splits[split] for shard in finished] for split in SPLITS}
    documents = {split: sum(shard.documents for shard in shards[split]) for split in SPLITS}
    left_out = _added_up(finished)
    _check_split(data, documents["train"], documents["validation"], left_out)
    require_unchanged(folder, corpus, claimed)
    write_report(folder, _report(data, finished, sum(documents.values()), left_out))
    write_manifest(
        folder,
        shards,
        vocab_size=job.vocab_size,
        tokenizer=job.tokenizer.fingerprint,
        target_tokenizer=None if target is None else target.fingerprint,
        corpus={**claimed, "content": corpus.content()},
        label_names=kept_label_names(folder),
        left_out=left_out,
        unigrams=unigrams,
    )
    tokens = {split: sum(shard.tokens for shard in shards[split]) for split in SPLITS}
    print(
        f"Prepared {tokens['train']:,} training and {tokens['validation']:,} held-out tokens of "
        f"{documents['train']:,} and {documents['validation']:,} documents in {folder.path} (left "
        f"out: {_reasons(left_out)})",
        file=sys.stderr,
    )


def _report(
    data: TextData, shards: list[FinishedShard], documents: int, left_out: dict[str, int]
) -> dict[str, Any]:
    """See `write_report`."""
    read, unread = 0, dict[str, list[int]]()
    for source in data.sources:
        size, others = sources.not_read(source)
        read += size
        for kind, counts in others.items():
            unread[kind] = [
                one + more for one, more in zip(unread.get(kind, (0, 0)), counts, strict=True)
            ]
    return {
        "read": read,
        "unread": unread,
        "documents": documents,
        "left_out": left_out,
        "cut": sum(shard.cut for shard in shards),
        "tokenizers": added_up(shard.tokenizers for shard in shards),
    }


def _added_up(shards: list[FinishedShard]) -> dict[str, int]:
    """How many documents were left out of all shards, by reason."""
    total = Counts().left_out()
    for shard in shards:
        total = {name: count + shard.left_out[name] for name, count in total.items()}
    return total


def _reasons(left_out: dict[str, int]) -> str:
    """Counts for people; what the filters kept out only where they did."""
    words = {"short": "too short", "long": "too long", "duplicates": "duplicates"}
    filters = [f", {left_out[name]:,} {word}" for name, word in words.items() if left_out[name]]
    return f"{left_out['empty']:,} empty documents, {left_out['invalid']:,} invalid ones" + "".join(
        filters
    )


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
