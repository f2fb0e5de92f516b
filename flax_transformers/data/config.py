"""Settings of data: what to read, how to prepare it, how to feed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import AnySource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.former_names import accepts_former_fields
from flax_transformers.ranges import Ranges


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What data of any kind has. A plain record: nothing is read when it is made."""

    store: str | None = None
    """Folder or bucket (gs://, s3://) of what ``prepare`` makes. By default one below
    $XDG_CACHE_HOME or ~/.cache, named after the content and the settings."""

    prepare_processes: int | None = None
    """Processes that prepare; by default one per core, or this one alone for little data."""

    workers: int = 0
    """Processes per host that make training examples; 0 makes them in the training process."""

    verify: bool = True
    """Read the whole store once when a run opens it, and compare it with its digests (about a
    second per GB); of a store in a bucket, compare sizes alone (``prepare --verify`` reads it).
    False compares sizes alone."""

    RANGES: ClassVar[Ranges] = {
        "prepare_processes": ranges.integers(1, 4096),
        "workers": ranges.integers(0, 4096),
        "validation_fraction": ranges.RATE,
        "shards": ranges.integers(1, 99_999),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data")


@accepts_former_fields(gates="filters")
@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """Text for training and for evaluation, kept in a token store."""

    source: AnySource = field(default_factory=TextSource)
    """The corpus."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Which tokenizer to train on the training documents, or to load."""

    target_tokenizer: TokenizerConfig | None = None
    """One of their own for the targets of a `PairSource`; ``tokenizer`` then reads the sources
    alone. Its vocabulary is that of ``model.decoder_vocab_size``."""

    validation_source: AnySource | None = None
    """A corpus of its own for evaluation; then none of ``source`` is held out."""

    validation_fraction: float = 0.01
    """Share of documents held out for evaluation, drawn by a hash of their text: exact duplicates
    stay on one side. 0 holds out nothing."""

    filters: Filters = field(default_factory=Filters)
    """Which documents are let in: length limits, and exact duplicates only once."""

    shards: int = 8
    """Files per kind that the store is divided into, and so the unit of resumption. What the store
    holds depends on it, but not on how many processes write."""

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

    @property
    def sources(self) -> tuple[AnySource, ...]:
        """All corpora that are read."""
        given = (self.source, self.validation_source)
        return tuple(source for source in given if source is not None)

    @property
    def held_out_fraction(self) -> float:
        """Share of ``source`` that is held out."""
        return 0.0 if self.validation_source is not None else self.validation_fraction
