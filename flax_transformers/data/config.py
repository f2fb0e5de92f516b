"""Settings of text data: what to read and how to prepare it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.base import DataConfig, EvaluationSet, Tokenizers
from flax_transformers.data.prepare.cached_stores import former_stores, text_directory
from flax_transformers.data.prepare.corpus import Corpus
from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.prepare.origin import Origin, source_settings, without_paths
from flax_transformers.data.prepare.text import TextPreparation
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import AnySource
from flax_transformers.data.sources.records import Source
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.store.files import digest
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec
from flax_transformers.storage.folders import open_folder

_DUMMY_TOKENS = 8  # few, because sequences may be short


@dataclass(frozen=True, kw_only=True)
class ReadsText:
    """Base of data configs that read text from sources."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All corpora that are read."""
        raise NotImplementedError

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        """See `DataConfig`: the objective may ask for pairs, labels or images."""
        kind = type(self).__name__
        if spec.data is not None:
            raise UserError(
                f"objective {objective} learns from {spec.data}, but data is a {kind}; set data to "
                f"{spec.data}, or choose another objective"
            )
        wanted = spec.target_kind
        for source in self.sources:
            if wanted in (None, source.target_kind):
                continue
            what = wanted if wanted == "pairs" else f"the labels {wanted!r}"
            raise UserError(
                f"objective {objective} learns {what}, which the {type(source).__name__} of "
                f"{source.path} does not give; set data.source to a {spec.source_kind}, or choose "
                "another objective"
            )

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        """See `DataConfig`."""
        tokens = np.full(min(_DUMMY_TOKENS, spec.length), token, np.int32)
        return spec.dummy_example(tokens, max((source.texts for source in self.sources), default=1))


@dataclass(frozen=True, kw_only=True)
class TextData(ReadsText, DataConfig):
    """Text for training and evaluation, prepared as a token store."""

    source: AnySource = field(default_factory=TextSource)
    """The corpus."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer to train on the training documents, or to load."""

    target_tokenizer: TokenizerConfig | None = None
    """A separate tokenizer for the targets of a `PairSource`; ``tokenizer`` is then for the sources
    only. ``model.decoder_vocab_size`` is the size of its vocabulary."""

    validation_source: AnySource | None = None
    """A separate corpus for evaluation; then nothing of ``source`` is held out."""

    validation_fraction: float = 0.01
    """Fraction of documents held out for evaluation, chosen by a hash of their text: exact
    duplicates stay in one split. 0 holds out nothing."""

    filters: Filters = field(default_factory=Filters)
    """Which documents are kept: limits of length, and exact duplicates only once."""

    shards: int = 8
    """Number of shards of the store, and so the unit of resumption. The content of the store
    depends on it, but not on the number of processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_tokenizer is not None and not all(
            isinstance(source, PairSource | None)
            for source in (self.source, self.validation_source)
        ):
            raise UserError(
                "target_tokenizer is for pairs of a source and a target; leave it out, or give a "
                "PairSource."
            )
        held_out = self.validation_source
        if held_out is not None and held_out.label_kind != self.source.label_kind:
            theirs, ours = (one.label_kind or "none" for one in (held_out, self.source))
            raise UserError(
                f"data.validation_source ({held_out.path}) has other labels, {theirs}, than "
                f"data.source, {ours}; give a {type(self.source).__name__} with the same labels"
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(self.corpus.sources.values())

    @property
    def corpus(self) -> Corpus:
        """The corpus as preparation reads it."""
        return Corpus(
            self.source,
            self.validation_source,
            0.0 if self.validation_source is not None else self.validation_fraction,
            self.filters,
            self.shards,
        )

    @property
    def tokenizers(self) -> dict[str, TokenizerConfig]:
        both = {"tokenizer": self.tokenizer, "target_tokenizer": self.target_tokenizer}
        return {name: config for name, config in both.items() if config is not None}

    def of_evaluation_set(self, one: EvaluationSet, label_names: tuple[str, ...] = ()) -> TextData:
        same = super().of_evaluation_set(one, label_names)
        settings = {field.name: getattr(same, field.name) for field in fields(same)}
        return self.held_out_kind()(**settings | {"validation_fraction": 1.0})

    def held_out_kind(self) -> type[TextData]:
        """The class of its evaluation sets, of which everything is held out."""
        return _HeldOutText

    @property
    def origin(self) -> Origin:
        """What the token store is made from."""
        other = self.validation_source
        defaults = type(self)(
            source=type(self.source)(), validation_source=None if other is None else type(other)()
        )
        return Origin(
            path=self.source.path,
            settings=self._settings(),
            defaults=defaults._settings(),
            sizes=partial(_hash_of_all, sources.sizes, self.sources),
            content=partial(_hash_of_all, sources.fingerprint, self.sources),
            loaded={name: one for name, one in self.tokenizers.items() if one.path},
            all_sizes=partial(_hash_of_all, partial(sources.sizes, split=False), self.sources),
            all_content=partial(
                _hash_of_all, partial(sources.fingerprint, split=False), self.sources
            ),
        )

    def _settings(self) -> dict[str, Any]:
        """The settings that the bytes of the store depend on, as JSON."""
        other = self.validation_source
        settings = {
            "source": source_settings(self.source),
            "validation_source": None if other is None else source_settings(other),
            "validation_fraction": self.validation_fraction,
            "gates": asdict(self.filters),  # the name in stores of all versions
            "shards": self.shards,
        }
        tokenizers = {name: config.settings for name, config in self.tokenizers.items()}
        return without_paths(settings | tokenizers)

    def preparation(
        self,
        output: str | os.PathLike[str] | None = None,
        of_run: Tokenizers = MappingProxyType({}),
        *,
        tokenizer: Tokenizer | None = None,
    ) -> TextPreparation:
        """See `DataConfig`. ``tokenizer``: the mixture's, used instead of ``self.tokenizer``."""
        path, origin = output or self.store, self.origin
        if not path:
            trained_on = self.validation_fraction < 1  # others are evaluation sets
            path = text_directory({"text": origin}, _identity, of_run, trained_on=trained_on)
        return TextPreparation(
            folder=open_folder(path),
            origin=origin,
            shards=self.shards,
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            target_tokenizer=self.target_tokenizer,
            processes=self.prepare_processes,
            verify=self.verify,
            given=tokenizer,
            of_run=of_run,
        )

    def former_stores(self, of_run: Tokenizers) -> Iterable[str]:
        return () if self.store else former_stores({"text": self.origin}, _identity, of_run)


class _HeldOutText(TextData):
    """Text of an evaluation set, all held out: only held-out documents keep what scoring needs."""

    RANGES: ClassVar[ranges.Ranges] = {"validation_fraction": ranges.SHARE}


def _identity(of: Mapping[str, Origin]) -> str:
    return of["text"].identity


def _hash_of_all(find: Callable[[Source], str], used: Sequence[Source]) -> str:
    return digest({"sources": [find(source) for source in used]})
