"""Several corpora as one: a tokenizer for all, a token store each, mixed example by example.

As for multilingual models: BERT and XLM-R (arXiv:1911.02116 §3.1) draw a language of size n with
a probability in proportion to n**0.7 and n**0.3, mT5 (arXiv:2010.11934 §3.1) to n**0.3.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from flax_transformers import ranges
from flax_transformers.data.config import DataConfig, TextData
from flax_transformers.data.pipeline.examples import MixedExamples
from flax_transformers.data.prepare.cached_stores import (
    Tokenizers,
    beside_others,
    cache_directory,
    no_store,
)
from flax_transformers.data.prepare.filters import Filters, let_in
from flax_transformers.data.prepare.shards import is_held_out
from flax_transformers.data.prepare.store_locks import (
    Compare,
    corpus_of,
    without_paths,
)
from flax_transformers.data.prepare.text import (
    PreparedText,
    begin_text,
    open_prepared,
    prepare_shards,
    prepare_text,
)
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.documents import Counts, listed
from flax_transformers.data.sources.read import AnySource
from flax_transformers.data.store.files import digest, to_json
from flax_transformers.data.store.token_store import Split
from flax_transformers.data.store.tokenizer import at_hand, own_tokenizer, save_tokenizer
from flax_transformers.data.tokenizers.facts import CONFIG_FILE
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.former_names import accepts_former_fields
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.ranges import Ranges
from flax_transformers.storage.folders import Folder, open_folder
from flax_transformers.storage.locks import exclusive_lock

MIXTURE = "mixture.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One corpus of a mixture, such as a language."""

    name: str
    """Of the folder of its store, and in the names of its metrics ("eval/loss_de")."""

    source: AnySource

    validation_source: AnySource | None = None
    """A corpus of its own for evaluation; then none of ``source`` is held out."""

    weight: float | None = None
    """How often its examples come, beside the others' weights."""

    RANGES: ClassVar[Ranges] = {"weight": ranges.numbers(0, 1e12, above=True)}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.components")


@accepts_former_fields(gates="filters")
@dataclass(frozen=True, kw_only=True)
class MixedText(DataConfig):
    """Several corpora with one tokenizer, mixed example by example; goes where a TextData goes.
    The two sides of pairs share it, too.

    Each component has a token store of its own below ``store``: one more makes no other anew, and
    the tokenizer that is there stays. ``evaluation.max_examples`` are those of each component.
    """

    components: tuple[Component, ...]

    exponent: float = 0.7
    """Where components have no weights they are their numbers of tokens to this power: 1 takes all
    text as often, 0 all components."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Trained on documents of all components, their characters in proportion to the weights (or the
    numbers of characters to the power); small ones are repeated for it."""

    validation_fraction: float = 0.01
    """Share of each component's documents that is held out; see `TextData`."""

    filters: Filters = field(default_factory=Filters)
    """Which documents are let in; duplicates are looked for within a component."""

    shards: int = 8
    """Files per kind that each store is divided into; see `TextData`."""

    RANGES: ClassVar[Ranges] = {"exponent": ranges.SHARE}

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [component.name for component in self.components]
        if not names:
            raise UserError("components is empty; give at least one Component(name=..., ...).")
        for name in names:
            if not _NAME.fullmatch(name) or name == "tokenizer" or names.count(name) > 1:
                raise UserError(
                    f"A component's name is {name!r}; give each one of its own, of letters, digits "
                    'and "_.-", and not "tokenizer".'
                )
        weights = [component.weight for component in self.components]
        if any(weight is not None for weight in weights) and None in weights:
            raise UserError(
                f"The component {names[weights.index(None)]!r} has no weight, but others have; "
                "give all of them one, or none for weights by size."
            )
        self.part(self.components[0])  # what a TextData refuses is refused here

    @property
    def sources(self) -> tuple[AnySource, ...]:
        """All corpora that are read."""
        return tuple(source for one in self.components for source in self.part(one).sources)

    def part(self, component: Component) -> TextData:
        """One component's data."""
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
        """How often examples of each component come, with their sum 1; ``sizes`` count its text."""
        given = [component.weight for component in self.components]
        found = [
            float(size) ** self.exponent if weight is None else weight
            for weight, size in zip(given, sizes, strict=True)
        ]
        return tuple(weight / sum(found) for weight in found)


@dataclass(frozen=True)
class PreparedMixture:
    """A token store for each component (a `Dataset`)."""

    directory: str
    data: MixedText
    tokenizer: Tokenizer
    parts: tuple[PreparedText, ...]
    known: Vocabulary | None = None
    """As in `PreparedText`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the components, in the order of ``parts``."""
        return tuple(component.name for component in self.data.components)

    @property
    def weights(self) -> tuple[float, ...]:
        """How often examples of each component come in training; their sum is 1."""
        return self.data.weights([part.train.num_tokens for part in self.parts])

    @property
    def target_tokenizer(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        return digest({"parts": [part.fingerprint for part in self.parts], "weights": self.weights})

    @property
    def known_as(self) -> tuple[str, ...]:
        parts = [part.train.former_fingerprint for part in self.parts]
        return (digest({"parts": parts, "weights": self.weights}),)

    @property
    def summary(self) -> str:
        total = sum(part.train.num_tokens for part in self.parts)
        shares = zip(self.names, self.parts, self.weights, strict=True)
        rows = [
            f"{name}: {part.train.num_tokens:,} training tokens ("
            f"{part.train.num_tokens / total:.2%}), {weight:.2%} of the examples\n"
            for name, part, weight in shares
        ]
        return (
            f"{''.join(rows)}{total:,} training tokens in {len(self.parts)} components, "
            f"{self.tokenizer.kind} of {self.vocabulary.size:,} pieces"
        )

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary if self.known is None else self.known

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those of every component. Raises UserError where they differ."""
        names = self.parts[0].label_names
        for name, part in zip(self.names, self.parts, strict=True):
            if part.label_names != names:
                raise UserError(
                    f"The component {name!r} has the classes {listed(part.label_names)}, but "
                    f"{self.names[0]!r} has {listed(names)}; give all components the same."
                )
        return names

    def examples(self, split: Split, spec: WindowSpec) -> MixedExamples | None:
        found = [
            (name, examples, weight)
            for name, part, weight in zip(self.names, self.parts, self.weights, strict=True)
            if (examples := part.examples(split, spec)) is not None
        ]
        if not found:
            return None
        names, parts, weights = zip(*found, strict=True)
        return MixedExamples(names, parts, weights)


def prepare_mixture(
    data: MixedText,
    output: str | os.PathLike[str] | None = None,
    *,
    of_run: Tokenizers = MappingProxyType({}),
    compare: Compare = "sizes",
) -> PreparedMixture:
    """Makes the token stores of all components, or opens those that are finished.

    As `prepare_text`, and raises UserError also for a tokenizer that is not the one asked for.
    """
    folder = _folder(data, output, of_run)
    tokenizer = _tokenizer(folder, data, of_run)
    parts = [
        prepare_text(
            data.part(one), f"{folder.path}/{one.name}", tokenizer=tokenizer, compare=compare
        )
        for one in data.components
    ]
    return PreparedMixture(folder.path, data, tokenizer, tuple(parts))


def begin_mixture(data: MixedText, output: str | os.PathLike[str] | None = None) -> None:
    """What has to be there before `prepare_mixture_shards`."""
    folder = _folder(data, output)
    tokenizer = _tokenizer(folder, data)
    for one in data.components:
        begin_text(data.part(one), f"{folder.path}/{one.name}", tokenizer=tokenizer)


def prepare_mixture_shards(
    data: MixedText, output: str | os.PathLike[str] | None, job: int, jobs: int
) -> PreparedMixture | None:
    """One job's share of the shards of every component; see `prepare_shards`."""
    folder = _folder(data, output)
    if data.tokenizer.needs_training and not folder.exists(MIXTURE):
        raise UserError(
            f"The token stores in {folder.path} are not begun; run `flax-transformers prepare` "
            "with the same config and --begin first, in one process."
        )
    tokenizer = _tokenizer(folder, data)
    parts = [
        prepare_shards(data.part(one), f"{folder.path}/{one.name}", job, jobs, tokenizer=tokenizer)
        for one in data.components
    ]
    finished = tuple(part for part in parts if part is not None)
    if len(finished) < len(parts):
        return None
    return PreparedMixture(folder.path, data, tokenizer, finished)


def open_mixture(data: MixedText, *, of_run: Tokenizers = MappingProxyType({})) -> PreparedMixture:
    """The finished stores of ``data``. Raises UserError where one is not there."""
    folder = _folder(data, None, of_run)
    if not folder.exists(MIXTURE):
        raise UserError(no_store("mixture", folder, data.tokenizer, of_run))
    tokenizer = _tokenizer(folder, data)
    parts = [
        open_prepared(data.part(one), f"{folder.path}/{one.name}", tokenizer=tokenizer)
        for one in data.components
    ]
    return PreparedMixture(folder.path, data, tokenizer, tuple(parts))


def _folder(
    data: MixedText,
    output: str | os.PathLike[str] | None,
    of_run: Tokenizers = MappingProxyType({}),
) -> Folder:
    path = output or data.store
    return open_folder(path or beside_others(_default_directory(data), of_run))


def _default_directory(data: MixedText) -> str:
    corpora = {one.name: corpus_of(data.part(one)) for one in data.components}

    def identity() -> str:
        made_of: dict[str, Any] = {name: one.identity for name, one in corpora.items()}
        return digest(made_of | {"weights": _weight_settings(data)})

    return cache_directory(corpora, identity)


def _weight_settings(data: MixedText) -> list[float | None]:
    return [data.exponent, *(component.weight for component in data.components)]


def _tokenizer(
    folder: Folder, data: MixedText, of_run: Tokenizers = MappingProxyType({})
) -> Tokenizer:
    """The one tokenizer of all components, trained if it is not there; noted last."""
    asked = without_paths({"tokenizer": data.tokenizer.settings})["tokenizer"]
    if not folder.exists(MIXTURE):
        with exclusive_lock(folder):
            if not folder.exists(MIXTURE):
                for source in data.sources:
                    sources.check_first_records(source)
                if not folder.exists(f"tokenizer/{CONFIG_FILE}"):
                    given = of_run.get("tokenizer") if data.tokenizer.needs_training else None
                    save_tokenizer(
                        folder, given or train_tokenizer(data.tokenizer, _training_texts(data))
                    )
                names = [component.name for component in data.components]
                folder.write(MIXTURE, to_json({"tokenizer": asked, "trained_on": names}))
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
            f"The tokenizer in {folder.path} was made with {theirs}, this run asks for {asked}; "
            "choose another store directory, or delete that one to make it anew."
        )
    new = [component.name for component in data.components if component.name not in names]
    if new and data.tokenizer.needs_training:
        print(f"The tokenizer in {folder.path} has not seen {', '.join(new)}", file=sys.stderr)
    return own_tokenizer(folder, data.tokenizer)


def _training_texts(data: MixedText) -> Iterator[str]:
    readers = [Texts(data.part(component)) for component in data.components]
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
class Texts:
    """Called, it reads the texts of the documents that nobody holds out."""

    data: TextData

    def __call__(self) -> Iterator[str]:
        documents = sources.read_documents(self.data.source)
        for _, document in let_in(documents, self.data.filters, Counts()):
            if not is_held_out(document, self.data.held_out_fraction):
                yield document.whole.replace("\0", "\n")


def in_proportion(
    readers: Sequence[Callable[[], Iterator[str]]], weights: Sequence[float]
) -> Iterator[str]:
    """Texts of all readers, their characters in proportion to the weights at any time.

    What comes to its end begins anew, until all have ended once.
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
