"""Mixtures of several corpora: one tokenizer, a token store each, mixed example by example.

BERT and XLM-R (arXiv:1911.02116 §3.1) draw a language of size n with a probability in proportion to
n**0.7 and n**0.3, mT5 (arXiv:2010.11934 §3.1) to n**0.3.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

from flax_transformers import ranges
from flax_transformers.data.base import (
    Compare,
    DataConfig,
    DatasetDefaults,
    EvaluationSet,
    Tokenizers,
)
from flax_transformers.data.config import ReadsText, TextData
from flax_transformers.data.pipeline.examples import MixedExamples
from flax_transformers.data.prepare.cached_stores import former_stores, text_directory
from flax_transformers.data.prepare.filters import Filters, let_in
from flax_transformers.data.prepare.origin import Origin, without_paths
from flax_transformers.data.prepare.text import RESUMED, PreparedText, TextPreparation
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts, listed
from flax_transformers.data.sources.read import AnySource
from flax_transformers.data.sources.records import Source
from flax_transformers.data.store.files import digest, record_json
from flax_transformers.data.store.token_store import Split
from flax_transformers.data.store.tokenizer import at_hand, is_saved, own_tokenizer, save_tokenizer
from flax_transformers.data.tokenizers.fitting import fitted_vocabulary, warn_left_out
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.storage.folders import Folder, open_folder
from flax_transformers.storage.locks import exclusive_lock

MIXTURE = "mixture.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One corpus of a mixture, such as a language."""

    name: str
    """Name of the folder of its store, and suffix of its metrics ("eval/loss_de")."""

    source: AnySource

    validation_source: AnySource | None = None
    """A separate corpus for evaluation; then nothing of ``source`` is held out."""

    weight: float | None = None
    """Relative frequency of its examples."""

    RANGES: ClassVar[ranges.Ranges] = {"weight": ranges.numbers(0, 1e12, above=True)}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.components")


@dataclass(frozen=True, kw_only=True)
class MixedText(ReadsText, DataConfig):
    """Several corpora with one tokenizer, mixed example by example; used like a `TextData`. The two
    sides of pairs share the tokenizer.

    Each component has its own token store below ``store``. A new component changes neither the
    other stores nor the tokenizer. ``evaluation.max_examples`` applies to each component.
    """

    components: tuple[Component, ...]

    exponent: float = 0.7
    """Components without weights are weighted by their number of tokens to this power: 1 draws all
    text equally often, 0 all components."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Trained on documents of all components, with numbers of characters in proportion to the
    weights (or to the numbers of characters to the power); small components are repeated."""

    validation_fraction: float = 0.01
    """Fraction of each component's documents to hold out; see `TextData`."""

    filters: Filters = field(default_factory=Filters)
    """Which documents are kept; duplicates are searched within a component."""

    shards: int = 8
    """Number of shards of each store; see `TextData`."""

    RANGES: ClassVar[ranges.Ranges] = {"exponent": ranges.SHARE}

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [component.name for component in self.components]
        if not names:
            raise UserError("components is empty; give at least one Component(name=..., ...).")
        for name in names:
            if not _NAME.fullmatch(name) or name == "tokenizer" or names.count(name) > 1:
                raise UserError(
                    f"A component's name is {name!r}; give each its own, of letters, digits "
                    'and "_.-", and not "tokenizer".'
                )
        weights = [component.weight for component in self.components]
        if any(weight is not None for weight in weights) and None in weights:
            raise UserError(
                f"The component {names[weights.index(None)]!r} has no weight, but others have; "
                "give all of them one, or none for weights by size."
            )
        if self.is_limited:
            raise UserError(
                "data.max_training_examples and data.examples_per_class are for data without "
                "components; leave them out"
            )
        for component in self.components:
            self.part(component)  # raises what TextData raises

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for one in self.components for source in self.part(one).sources)

    def part(self, component: Component) -> TextData:
        """The data of one component."""
        return TextData(
            source=component.source,
            validation_source=component.validation_source,
            tokenizer=self.tokenizer,
            validation_fraction=self.validation_fraction,
            filters=self.filters,
            shards=self.shards,
            prepare_processes=self.prepare_processes,
            verify=self.verify,
        )

    def weights(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """Relative frequencies of the components, with sum 1. ``sizes``: how much text each has."""
        given = [component.weight for component in self.components]
        found = [
            float(size) ** self.exponent if weight is None else weight
            for weight, size in zip(given, sizes, strict=True)
        ]
        return tuple(weight / sum(found) for weight in found)

    def of_evaluation_set(self, one: EvaluationSet, label_names: tuple[str, ...] = ()) -> TextData:
        if one.name in [component.name for component in self.components]:
            raise UserError(
                f"evaluation.sets has {one.name!r}, as a component of the mixture is called, whose "
                "predictions and reports have the same files; give the set another name"
            )
        part = replace(self.part(Component(name="", source=one.source)), store=self.store)
        return part.of_evaluation_set(one, label_names)

    @property
    def tokenizers(self) -> dict[str, TokenizerConfig]:
        return {"tokenizer": self.tokenizer}

    def preparation(
        self,
        output: str | os.PathLike[str] | None = None,
        of_run: Tokenizers = MappingProxyType({}),
    ) -> MixturePreparation:
        path = output or self.store or self._default_directory(of_run)
        return MixturePreparation(self, open_folder(path), of_run)

    def _default_directory(self, of_run: Tokenizers) -> str:
        identity = self._identity
        return text_directory(self._origins, identity, of_run, trained_on=True, marker=MIXTURE)

    def former_stores(self, of_run: Tokenizers) -> Iterable[str]:
        if self.store:
            return ()
        return former_stores(self._origins, self._identity, of_run, marker=MIXTURE)

    @property
    def _origins(self) -> dict[str, Origin]:
        return {one.name: self.part(one).origin for one in self.components}

    def _identity(self, of: Mapping[str, Origin]) -> str:
        made_of: dict[str, Any] = {name: one.identity for name, one in of.items()}
        weights = [self.exponent, *(component.weight for component in self.components)]
        return digest(made_of | {"weights": weights})


@dataclass(frozen=True)
class PreparedMixture(DatasetDefaults):
    """Token stores of all components (a `Dataset`)."""

    directory: str
    data: MixedText
    tokenizer: Tokenizer
    parts: tuple[PreparedText, ...]
    known: Vocabulary | None = None
    """As in `PreparedText`."""
    _opened: dict[tuple[Split, WindowSpec], MixedExamples | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components, in the order of ``parts``."""
        return tuple(component.name for component in self.data.components)

    @property
    def weights(self) -> tuple[float, ...]:
        """Relative frequencies of the components in training, with sum 1."""
        return self.data.weights([part.train.num_tokens for part in self.parts])

    @property
    def fingerprint(self) -> str:
        return digest({"parts": [part.fingerprint for part in self.parts], "weights": self.weights})

    @property
    def known_as(self) -> tuple[str, ...]:
        parts = [part.train.former_fingerprint for part in self.parts]
        return (digest({"parts": parts, "weights": self.weights}),)

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def summary(self) -> str:
        total = self.num_tokens
        shares = zip(self.names, self.parts, self.weights, strict=True)
        rows = [
            f"{name}: {part.train.num_tokens:,} training tokens ("
            f"{part.train.num_tokens / total:.2%}), {weight:.2%} of the examples\n"
            for name, part, weight in shares
        ]
        return (
            f"{''.join(rows)}{total:,} training tokens in {len(self.parts)} components, "
            f"{self.tokenizer.kind} with a vocabulary of {self.vocabulary.size:,}"
        )

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary if self.known is None else self.known

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes, which all components share; empty if one has none. Raises UserError if they
        differ."""
        first, *others = self.parts
        if not all(part.label_names for part in self.parts):
            return ()
        for name, part in zip(self.names[1:], others, strict=True):
            if part.label_names != first.label_names:
                raise UserError(
                    f"The component {name!r} has the classes {listed(part.label_names)}, but "
                    f"{self.names[0]!r} has {listed(first.label_names)}; give all components the "
                    "same."
                )
        return first.label_names

    @property
    def components(self) -> tuple[tuple[str, PreparedText], ...]:
        return tuple(zip(self.names, self.parts, strict=True))

    @property
    def held_out_fingerprint(self) -> str | None:
        found = [part.held_out_fingerprint for part in self.parts]
        return digest({"parts": found}) if any(found) else None

    def examples(self, split: Split, spec: WindowSpec) -> MixedExamples | None:
        """See `Dataset`. Opened once, because every phase asks for those of all phases before."""
        if (split, spec) not in self._opened:
            self._opened[split, spec] = self._open_examples(split, spec)
        return self._opened[split, spec]

    def _open_examples(self, split: Split, spec: WindowSpec) -> MixedExamples | None:
        found = [
            (name, examples, weight)
            for name, part, weight in zip(self.names, self.parts, self.weights, strict=True)
            if (examples := part.examples(split, spec)) is not None
        ]
        if not found:
            return None
        names, parts, weights = zip(*found, strict=True)
        return MixedExamples(names, parts, weights)

    def fitted(self, vocab_size: int, pad_id: int, target_vocab_size: int) -> PreparedMixture:
        whole = self.vocabulary
        known = fitted_vocabulary(whole, vocab_size, pad_id, target_vocab_size)
        if known == whole:
            return self
        if known.size < whole.size:
            for part in self.parts:
                part.refuse_unknown_tokens(vocab_size)
            warn_left_out(self.tokenizer, whole, known)
        return replace(self, known=known)

    def scored_on(self, other: PreparedText) -> PreparedText:
        """See `Dataset`. The training split is that of the set: a mixture is not one store."""
        return other

    def verify(self) -> None:
        for part in self.parts:
            part.verify()

    def verify_share(self, number: int, of: int) -> None:
        for part in self.parts:
            part.verify_share(number, of)

    def print_report(self) -> None:
        for part in self.parts:
            part.print_report()


@dataclass(frozen=True)
class MixturePreparation:
    """How the tokenizer and the token stores of a mixture are prepared (a `Preparation`).

    ``of_run``: tokenizers of the run, used instead of training a new one. Raises UserError also if
    the tokenizer in the folder is not the one asked for.
    """

    data: MixedText
    folder: Folder
    of_run: Tokenizers

    def check(self) -> None:
        for part in self._parts(None):
            part.check()

    def is_finished(self) -> bool:
        if not self.folder.exists(MIXTURE):
            return False
        return all(part.is_finished() for part in self._parts(self._tokenizer()))

    def run(self, compare: Compare = "sizes") -> PreparedMixture:
        tokenizer = self._tokenizer()
        return self._prepared(tokenizer, [part.run(compare) for part in self._parts(tokenizer)])

    def begin(self) -> None:
        for part in self._parts(self._tokenizer()):
            part.begin()

    def share(self, job: int, jobs: int) -> PreparedMixture | None:
        if self.data.tokenizer.needs_training and not self.folder.exists(MIXTURE):
            raise UserError(
                f"The token stores in {self.folder.path} are not started; run `flax-transformers "
                "prepare` with the same config and --begin first, in one process."
            )
        tokenizer = self._tokenizer()
        parts = [part.share(job, jobs) for part in self._parts(tokenizer)]
        finished = [part for part in parts if part is not None]
        return self._prepared(tokenizer, finished) if len(finished) == len(parts) else None

    def open(self, compare: Compare = "nothing") -> PreparedMixture:
        if not self.folder.exists(MIXTURE):
            resumed = RESUMED if self.of_run and self.data.tokenizer.needs_training else ""
            raise UserError(
                f"There is no finished mixture in {self.folder.path}; run `flax-transformers "
                f"prepare` with the same config first{resumed}, in one process."
            )
        tokenizer = self._tokenizer()
        return self._prepared(tokenizer, [part.open(compare) for part in self._parts(tokenizer)])

    def _parts(self, tokenizer: Tokenizer | None) -> list[TextPreparation]:
        return [
            self.data.part(one).preparation(f"{self.folder.path}/{one.name}", tokenizer=tokenizer)
            for one in self.data.components
        ]

    def _prepared(self, tokenizer: Tokenizer, parts: Sequence[PreparedText]) -> PreparedMixture:
        return PreparedMixture(self.folder.path, self.data, tokenizer, tuple(parts))

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of all components, trained if it does not exist yet."""
        data, folder = self.data, self.folder
        asked = without_paths({"tokenizer": data.tokenizer.settings})["tokenizer"]
        if not folder.exists(MIXTURE):
            for component in data.components:
                data.part(component).corpus.refuse_store_inside(folder.path)
            with exclusive_lock(folder):
                if not folder.exists(MIXTURE):
                    self._train_tokenizer(asked)
        try:
            found = json.loads(folder.read(MIXTURE))
            theirs = without_paths({"tokenizer": dict(found["tokenizer"])})["tokenizer"]
            names = list(found["trained_on"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"The file {MIXTURE} in {folder.path} is damaged; delete the folder and prepare it "
                "again."
            ) from error
        if theirs != asked and not at_hand(data.tokenizer):
            raise UserError(
                f"The tokenizer in {folder.path} was made with {theirs}, this run asks for "
                f"{asked}; choose another store directory, or delete that one to prepare it again."
            )
        new = [component.name for component in data.components if component.name not in names]
        if new and data.tokenizer.needs_training:
            added = ", ".join(new)
            print(f"The tokenizer in {folder.path} was not trained on {added}", file=sys.stderr)
        return own_tokenizer(folder, data.tokenizer)

    def _train_tokenizer(self, settings: Any) -> None:
        """Trains or loads the tokenizer, and notes its ``settings`` last."""
        data, folder = self.data, self.folder
        for source in data.sources:
            sources.check_first_records(source)
        if not is_saved(folder):
            given = self.of_run.get("tokenizer") if data.tokenizer.needs_training else None
            save_tokenizer(folder, given or train_tokenizer(data.tokenizer, _training_texts(data)))
        names = [component.name for component in data.components]
        folder.write(MIXTURE, record_json({"tokenizer": settings, "trained_on": names}))


def _training_texts(data: MixedText) -> Iterator[str]:
    readers = [TrainingTexts(data.part(component)) for component in data.components]
    if all(component.weight is not None for component in data.components):
        sizes = [0] * len(readers)
    else:
        sizes = [sum(map(len, reader())) for reader in readers]
    for component, size in zip(data.components, sizes, strict=True):
        if component.weight is None and not size:
            raise UserError(
                f"The component {component.name!r} has no text to train on; check its source."
            )
    return in_proportion(readers, data.weights(sizes))


@dataclass(frozen=True)
class TrainingTexts:
    """Calling it reads the texts of the documents that are not held out."""

    data: TextData

    def __call__(self) -> Iterator[str]:
        documents = sources.read_documents(self.data.source)
        for _, document in let_in(documents, self.data.filters, Counts()):
            if not self.data.corpus.holds_out(document):
                yield document.whole.replace("\0", "\n")


def in_proportion(
    readers: Sequence[Callable[[], Iterator[str]]], weights: Sequence[float]
) -> Iterator[str]:
    """Texts of all readers, with numbers of characters in proportion to the weights at any time.

    A reader that ends starts again, until all have ended once.
    """
    texts = [reader() for reader in readers]
    given = [0] * len(readers)
    unread = set(range(len(readers)))
    while unread:
        next_one = min(range(len(readers)), key=lambda i: given[i] / weights[i])
        text = next(texts[next_one], None)
        if text is None:
            unread.discard(next_one)
            texts[next_one] = readers[next_one]()
            if not given[next_one]:
                raise UserError(f"Component {next_one} of the mixture has no text to train on.")
            continue
        given[next_one] += len(text)
        yield text
