"""Prepares a token store: trains or loads the tokenizer once, then tokenizes every shard once.

Files in the order in which they are written (see `runner` for what an interruption leaves):

    corpus.json       what the store is made from
    duplicates/       only if duplicates are dropped
    tokenizer/        trained on the training documents only
    target_tokenizer/ only if the targets of pairs have their own
    labels.json       only if documents have labels with names
    shards/N.json     counts and checksums of shard N, written after its files
    report.json       what was left out or changed, for people
    manifest.json     last, after every file was verified

The number of passes over the corpus does not depend on the number of shards: one to hash its
content, unless the hash is cached (`file_hashes.content_digest`); one to tokenize it; one more to
find duplicates, if they are dropped; as much as training a tokenizer asks for
(``training_documents``), once for each tokenizer; the rest of that pass if the names of labels are
not given. Before, the first few megabytes are read to check that there is text.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from flax_transformers.data.base import Compare, DatasetDefaults, Tokenizers
from flax_transformers.data.pair_examples import PairExamples
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.data.prepare import origin
from flax_transformers.data.prepare.corpus import Corpus
from flax_transformers.data.prepare.duplicates import FOUND, find_duplicates, hash_shards, repeated
from flax_transformers.data.prepare.filters import let_in
from flax_transformers.data.prepare.labels import NAMES, LabelNames, has_names, kept_label_names
from flax_transformers.data.prepare.report import added_up, print_report, write_report
from flax_transformers.data.prepare.runner import StorePreparation, cores
from flax_transformers.data.prepare.shards import (
    FinishedShard,
    StoreJob,
    all_finished,
    checked_shards,
    write_shards,
)
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.sources.sharding import share
from flax_transformers.data.store.token_store import (
    FORMAT,
    KIND,
    MANIFEST,
    SPLITS,
    Split,
    TokenStore,
    read_manifest,
    write_manifest,
)
from flax_transformers.data.store.tokenizer import TARGET, is_saved, own_tokenizer, save_tokenizer
from flax_transformers.data.tokenizers.fitting import fitted_vocabulary, warn_left_out
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.labelled import LabelledSpec
from flax_transformers.objectives.sequence_to_sequence import PairSpec
from flax_transformers.storage.folders import Folder, open_folder

log = logging.getLogger(__name__)

_LITTLE_TEXT = 8_000_000  # characters that one process tokenizes faster than several start
RESUMED = (
    " and, as this run has trained already, with --data.tokenizer.path set to the folder "
    "`tokenizer` of its newest checkpoint"
)
"""What to add to the error for a missing store if the run has a tokenizer."""


@dataclass(frozen=True)
class PreparedText(DatasetDefaults):
    """Text in a token store (a `Dataset`). ``validation`` is None if nothing is held out."""

    directory: str
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore | None
    target_tokenizer: Tokenizer | None = None
    known: Vocabulary | None = None
    """The part of the vocabulary that the model has embeddings for, if it is not all."""

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    @property
    def known_as(self) -> tuple[str, ...]:
        return (self.train.former_fingerprint,)

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens

    @property
    def summary(self) -> str:
        held_out = self.validation.num_tokens if self.validation else 0
        target = self.target_tokenizer
        return (
            f"{self.train.num_tokens:,} training tokens in {self.train.num_documents:,} documents, "
            f"{held_out:,} held out, {self.tokenizer.kind} with a vocabulary of "
            f"{self.vocabulary.size:,}"
            + (f", {target.kind} of {target.vocabulary.size:,} for targets" if target else "")
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
                "targets, which only the objective SequenceToSequence can use; choose that one, or "
                "leave out data.target_tokenizer."
            )
        if isinstance(spec, LabelledSpec):
            return LabelledExamples(store, spec)
        return TextExamples(store, spec)

    def fitted(self, vocab_size: int, pad_id: int, target_vocab_size: int) -> PreparedText:
        whole = self.vocabulary
        if self.target_tokenizer is not None:  # the counts are of both vocabularies
            if self._beyond(vocab_size) is not None:
                vocab_size = max(vocab_size, whole.size)
            if self._beyond(target_vocab_size) is not None:
                target_vocab_size = max(target_vocab_size, whole.of_targets.size)
        known = fitted_vocabulary(whole, vocab_size, pad_id, target_vocab_size)
        if known == whole:
            return self
        if known.size < whole.size:
            self.refuse_unknown_tokens(vocab_size)
            warn_left_out(self.tokenizer, whole, known)
        return replace(self, known=known)

    def scored_on(self, other: PreparedText) -> PreparedText:
        return replace(self, validation=other.validation)

    def refuse_unknown_tokens(self, vocab_size: int) -> None:
        """Raises UserError if the text contains an id of ``vocab_size`` or more."""
        token = self._beyond(vocab_size)
        if token is not None:
            name = self.tokenizer.pieces([token])[0]
            raise UserError(
                f"the text in {self.directory} has the token {name!r} with id {token}, but "
                f"model.vocab_size is {vocab_size}; set --model.vocab-size "
                f"{self.tokenizer.vocabulary.size} for a model that is trained from scratch, "
                "or use the tokenizer of the model"
            )

    def _beyond(self, vocab_size: int) -> int | None:
        """An id of ``vocab_size`` or more in the text; None if there is none."""
        for store in filter(None, (self.train, self.validation)):
            beyond = store.unigram_counts[vocab_size:].nonzero()[0]
            if len(beyond):
                return vocab_size + int(beyond[0])
        return None

    def verify(self) -> None:
        for store in filter(None, (self.train, self.validation)):
            store.verify()

    def verify_share(self, number: int, of: int) -> None:
        for store in filter(None, (self.train, self.validation)):
            store.verify_on_opening(number, of)

    def print_report(self) -> None:
        print_report(open_folder(self.directory))


@dataclass(frozen=True, kw_only=True)
class TextPreparation(StorePreparation[PreparedText, StoreJob]):
    """How a token store is prepared.

    ``processes``: default one, or one per core for much text. ``given``: the tokenizer of a
    mixture, used instead of ``tokenizer``. ``of_run``: tokenizers of the run, used instead of
    training new ones.
    """

    kind: ClassVar[str] = KIND
    manifest: ClassVar[str] = MANIFEST

    corpus: Corpus
    tokenizer: TokenizerConfig
    target_tokenizer: TokenizerConfig | None = None
    processes: int | None = None
    verify: bool = True
    given: Tokenizer | None = None
    of_run: Tokenizers = field(default_factory=dict)

    def no_store(self) -> str:
        message = super().no_store()
        if self.of_run and self.tokenizer.needs_training:
            return message.replace("same config first,", f"same config first{RESUMED},")
        return message

    def count_processes(self, *, whole: bool) -> int:
        self.corpus.refuse_store_inside(self.folder.path)
        self.corpus.warn_of_shared_files()
        little = whole and self._check_beginning()
        return self.processes or (1 if little else cores())

    def _check_beginning(self) -> bool:
        """Whether the corpus is little text; if it is, checks that it contains training text."""
        corpus, counts = self.corpus, Counts()
        for source in corpus.sources.values():
            sources.check_first_records(source)
        characters = documents = held_out = 0
        for _, document in let_in(sources.read_documents(corpus.source), corpus.filters, counts):
            documents += 1
            held_out += corpus.holds_out(document)
            characters += len(document.whole)
            if characters > _LITTLE_TEXT:
                return False
        _check_split(corpus, documents - held_out, held_out, counts.left_out())
        return True

    def begin_job(self, claimed: dict[str, Any], processes: int) -> StoreJob:
        folder, corpus = self.folder, self.corpus
        if corpus.filters.drop_duplicates and not folder.exists(FOUND):
            hash_shards(folder, corpus, processes)
            find_duplicates(folder, corpus.shards)
        documents = training_documents(folder, corpus)
        names = LabelNames(folder, corpus.source)
        side = None if self.target_tokenizer is None else 0
        given = self.given or self._of_run("tokenizer", self.tokenizer)
        if not is_saved(folder):
            texts = _texts(names.seen(documents), side)
            save_tokenizer(folder, given or train_tokenizer(self.tokenizer, texts))
        target = self.target_tokenizer
        given_target = None if target is None else self._of_run(TARGET, target)
        if target is not None and not is_saved(folder, TARGET):
            texts = _texts(training_documents(folder, corpus), 1)
            save_tokenizer(folder, given_target or train_tokenizer(target, texts), TARGET)
        names.keep(documents)
        return self.make_job(claimed, given, given_target)

    def _of_run(self, name: str, config: TokenizerConfig) -> Tokenizer | None:
        return self.of_run.get(name) if config.needs_training else None

    def make_job(
        self,
        claimed: dict[str, Any],
        given: Tokenizer | None,
        given_target: Tokenizer | None = None,
    ) -> StoreJob:
        """What tokenizing a shard takes; ``given``: tokenizers used instead of new ones."""
        tokenizer = own_tokenizer(self.folder, self.tokenizer, given)
        target = self._own_target(given_target)
        return StoreJob(self.folder, self.corpus, claimed, tokenizer, target)

    def _own_target(self, given: Tokenizer | None = None) -> Tokenizer | None:
        """The store's tokenizer of targets, if they have their own."""
        config = self.target_tokenizer
        return None if config is None else own_tokenizer(self.folder, config, given, name=TARGET)

    def resume_job(self, claimed: dict[str, Any]) -> StoreJob:
        """See `StorePreparation`. Tokenizers without training are equal in every job, and saved by
        the first one."""
        folder, target = self.folder, self.target_tokenizer
        missing = [
            self.corpus.filters.drop_duplicates and not folder.exists(FOUND),
            self.given is None and self.tokenizer.needs_training and not is_saved(folder),
            target is not None and target.needs_training and not is_saved(folder, TARGET),
            has_names(self.corpus.source) and not folder.exists(NAMES),
        ]
        if any(missing):
            raise UserError(
                f"The token store in {folder.path} is not started; run `flax-transformers prepare` "
                "with the same config and --begin first, in one process."
            )
        if not is_saved(folder):
            save_tokenizer(folder, self.given or train_tokenizer(self.tokenizer, ()))
        if target is not None and not is_saved(folder, TARGET):
            save_tokenizer(folder, train_tokenizer(target, ()), TARGET)
        return self.make_job(claimed, self.given)

    def write_share(self, job: StoreJob, number: int, jobs: int, processes: int) -> None:
        """See `StorePreparation`. Shards of a share are neighbours, so that it reads one share of
        the corpus."""
        every = range(self.shards)
        chosen = every if jobs == 1 else share(number, jobs, self.corpus.tied_shards())
        write_shards(job, chosen, processes)

    def is_complete(self, job: StoreJob) -> bool:
        return all_finished(job)

    def finish(self, job: StoreJob, processes: int) -> None:
        folder, target = self.folder, job.target_tokenizer
        finished, unigrams = checked_shards(job, processes)
        shards = {split: [shard.splits[split] for shard in finished] for split in SPLITS}
        documents = {split: sum(shard.documents for shard in shards[split]) for split in SPLITS}
        left_out = _added_up(finished)
        _check_split(self.corpus, documents["train"], documents["validation"], left_out)
        held_out = self.corpus.validation_source
        if held_out is not None and documents["validation"] == 0:
            raise UserError(
                f"The corpus {held_out.path} is empty, or nothing of it is left; give a "
                "validation_source with text, or leave it out."
            )
        origin.require_unchanged(folder, self.origin, job.claimed)
        write_report(folder, _report(self.corpus, finished, sum(documents.values()), left_out))
        write_manifest(
            folder,
            shards,
            vocab_size=job.vocab_size,
            tokenizer=job.tokenizer.fingerprint,
            target_tokenizer=None if target is None else target.fingerprint,
            corpus={**job.claimed, "content": self.origin.content()},
            label_names=kept_label_names(folder),
            left_out=left_out,
            unigrams=unigrams,
        )
        tokens = {split: sum(shard.tokens for shard in shards[split]) for split in SPLITS}
        print(
            f"Prepared {tokens['train']:,} training and {tokens['validation']:,} held-out tokens "
            f"of {documents['train']:,} and {documents['validation']:,} documents in {folder.path} "
            f"(left out: {_reasons(left_out)})",
            file=sys.stderr,
        )

    def read_store(self, *, verified: bool, compare: Compare) -> PreparedText:
        folder = self.folder
        manifest = read_manifest(folder)
        earlier = origin.require_same_settings(folder, manifest["corpus"], self.origin)
        if origin.require_same_source(folder, manifest["corpus"], self.origin, compare) or earlier:
            log.warning(
                "the token store in %s was made by an earlier version, which took these sources "
                "otherwise (CHANGELOG.md); a run that began with it can use it: prepare another "
                "directory for new ones", folder.path,
            )  # fmt: skip
        tokenizer = self.given or own_tokenizer(folder, self.tokenizer)
        target = self._own_target()
        if manifest["format"] < FORMAT and tokenizer.kind in ("unigram", "bpe"):
            print(
                f"The token store in {folder.path} has format {manifest['format']}, in which each "
                "sentence was tokenized separately: its ids differ slightly from the tokenizer's. "
                "Runs that started with it can use it; prepare another directory for new ones.",
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
        if self.verify and not verified:
            train.verify_on_opening()
            validation.verify_on_opening()
        held_out = validation if validation.num_tokens else None
        return PreparedText(folder.path, tokenizer, train, held_out, target)


def training_documents(folder: Folder, corpus: Corpus) -> Iterator[Document]:
    """The documents that are not held out."""
    reader = sources.CorpusReader(corpus.source, range(corpus.shards), corpus.shards)
    for shard in range(corpus.shards):
        repeats = repeated(folder, corpus, "train", shard)
        documents = let_in(reader.documents(shard, Counts()), corpus.filters, Counts(), repeats)
        for _, document in documents:
            if not corpus.holds_out(document):
                yield document


def _check_split(corpus: Corpus, train: int, held_out: int, left_out: dict[str, int]) -> None:
    path, fraction = corpus.source.path, corpus.held_out_fraction
    if train + held_out == 0:
        if any(left_out.values()):
            raise UserError(
                f"The corpus {path} is empty: no document is left ({_reasons(left_out)})."
            )
        raise UserError(f"The corpus {path} is empty: it contains no document with text.")
    if held_out == 0 and fraction > 0:
        raise UserError(
            f"validation_fraction {fraction} holds out none of the {train} "
            f"documents of {path}; raise it, give a validation_source, or set it to 0."
        )
    if train == 0 and fraction < 1:
        raise UserError(
            f"validation_fraction {fraction} holds out all {held_out} documents "
            f"of {path}; lower it."
        )


def _texts(documents: Iterable[Document], side: int | None) -> Iterator[str]:
    """Texts to train a tokenizer on: one side of a pair, or both on separate lines."""
    for document in documents:
        yield document.whole.replace("\0", "\n") if side is None else document.text[side]


def _report(
    corpus: Corpus, shards: list[FinishedShard], documents: int, left_out: dict[str, int]
) -> dict[str, Any]:
    """See `write_report`."""
    read, unread = 0, dict[str, list[int]]()
    for source in corpus.sources.values():
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
    """Number of documents left out of all shards, by reason."""
    total = Counts().left_out()
    for shard in shards:
        total = {name: count + shard.left_out[name] for name, count in total.items()}
    return total


def _reasons(left_out: dict[str, int]) -> str:
    """Counts by reason, for people; those of filters only if there are any."""
    words = {"short": "too short", "long": "too long", "duplicates": "duplicates"}
    filters = [f", {left_out[name]:,} {word}" for name, word in words.items() if left_out[name]]
    return f"{left_out['empty']:,} empty documents, {left_out['invalid']:,} invalid ones" + "".join(
        filters
    )
