"""Settings of text data: what to read, how to tokenise it, how to feed it."""

from __future__ import annotations

from dataclasses import dataclass, field

from flax_transformers.data.sources import TextSource
from flax_transformers.data.tokenizers import TokenizerConfig
from flax_transformers.errors import UserError


@dataclass(frozen=True)
class TextData:
    """Text for training and for evaluation. A plain record: nothing is read when it is made."""

    source: TextSource = field(default_factory=TextSource)
    """The corpus."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Which tokenizer to train on the training documents, or to load."""

    validation_source: TextSource | None = None
    """A corpus of its own for evaluation; then none of ``source`` is held out."""

    validation_fraction: float = 0.01
    """Share of documents held out for evaluation, drawn by a hash of their text: exact duplicates
    stay on one side. 0 holds out nothing."""

    store: str | None = None
    """Folder or bucket (gs://, s3://) of the token store. By default one below $XDG_CACHE_HOME or
    ~/.cache, named after the corpus and the settings above."""

    shards: int = 8
    """Files per kind that the store is divided into, and so the unit of resumption. What the store
    holds depends on it, but not on how many processes write."""

    prepare_processes: int | None = None
    """Processes that tokenise; by default one per core, or this one alone for little text."""

    workers: int = 0
    """Processes per host that make training examples; 0 makes them in the training process."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction is {self.validation_fraction}; give a share of the "
                "documents from 0 up to, but not including, 1."
            )
        if self.shards < 1 or self.shards > 99_999:
            raise UserError(f"shards is {self.shards}; give a number from 1 to 99999.")
        if self.prepare_processes is not None and self.prepare_processes < 1:
            raise UserError(f"prepare_processes is {self.prepare_processes}; give 1 or more.")
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}; give 0 or more.")

    @property
    def held_out_fraction(self) -> float:
        """Share of ``source`` that is held out."""
        return 0.0 if self.validation_source is not None else self.validation_fraction
