"""Interfaces of data: the settings of a config, how its store is prepared, and the prepared data.

Each kind of data (text, mixtures, images, Python sequences) implements these. No other code asks
which kind it has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.store.token_store import Split
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec

Tokenizers = Mapping[str, Tokenizer]
"""Tokenizers by the names of their folders, "tokenizer" and "target_tokenizer"."""

Compare = Literal["nothing", "warning", "sizes", "content"]
"""What of the source is compared with a finished store. "content" reads the source; "warning" is
"sizes", of which a difference is only logged."""


_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class EvaluationSet:
    """Labelled or plain data of its own that a run is scored on, such as another language.

    Its metrics are "eval/NAME/loss" ... The other settings, the tokenizer and the classes are those
    of the training data.
    """

    name: str
    source: Any
    """A source of the kind that the training data has; all of it is scored, but of images and of a
    `SignalSource` what they hold out, if they have such a split."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _SET_NAME.fullmatch(self.name):
            raise UserError(
                f"the name of an evaluation set is {ranges.shown(self.name)}; give it letters, "
                'digits and "_.-"'
            )
        if isinstance(self.source, type) or not is_dataclass(self.source):
            raise UserError(
                f"the source of the evaluation set {self.name} is {ranges.shown(self.source)}; "
                "give it a source such as that of the training data"
            )


class Dataset(Protocol):
    """Prepared data as training and evaluation use it."""

    @property
    def directory(self) -> str:
        """Where the data is stored, for messages."""

    @property
    def fingerprint(self) -> str:
        """Hash of the training examples: a run resumes only with the data it started with."""

    @property
    def known_as(self) -> tuple[str, ...]:
        """Fingerprints that earlier versions computed for the same examples."""

    @property
    def summary(self) -> str:
        """Counts of documents and tokens, or of images, for people."""

    @property
    def num_tokens(self) -> int:
        """Number of training tokens; 0 for data that is not tokenized ahead."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Saved with every checkpoint; None for data without text."""

    @property
    def target_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the targets of pairs, if they have their own; saved as well."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What objectives know of the tokenizers."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes of labelled data in the order of their numbers; empty for other data."""

    @property
    def components(self) -> tuple[tuple[str, Dataset], ...]:
        """The components of a mixture by name; other data is one component named ""."""

    @property
    def held_out_fingerprint(self) -> str | None:
        """Hash of the validation split of the store; None without a store or such a split."""

    def examples(self, split: Split, spec: WindowSpec) -> Examples | None:
        """Raw examples in the form that the objective's ``spec`` asks for; None for an empty
        validation split. Raises UserError if the data cannot give such examples."""

    def fitted(self, vocab_size: int, pad_id: int, target_vocab_size: int) -> Dataset:
        """The data with the part of its vocabulary that a model has embeddings for.

        ``pad_id``: the model's padding id, -1 for none. Raises UserError if the text contains a
        token that the model has no embedding for. If that is not known, the whole vocabulary is
        kept, which the check of the run then refuses."""

    def scored_on(self, other: Any) -> Dataset:
        """The training split of this data, with the evaluation set ``other`` as what is held out.

        ``other``: what `DataConfig.of_evaluation_set` describes, prepared."""

    def verify(self) -> None:
        """Reads every file and compares checksums. Raises UserError naming a damaged file."""

    def verify_share(self, number: int, of: int) -> None:
        """What opening the data verifies, divided among ``of`` processes that see the same files;
        ``number`` from 0. Raises UserError naming a damaged file."""

    def print_report(self) -> None:
        """Prints on stderr what the preparation left out or changed."""


class DatasetDefaults:
    """Base of a `Dataset`: what holds for data without files, tokens and components."""

    target_tokenizer: Tokenizer | None = None

    @property
    def known_as(self) -> tuple[str, ...]:
        return ()

    @property
    def num_tokens(self) -> int:
        return 0

    @property
    def held_out_fingerprint(self) -> str | None:
        return getattr(getattr(self, "validation", None), "fingerprint", None)

    @property
    def components(self) -> tuple[tuple[str, Any], ...]:
        return (("", self),)

    def fitted(self, vocab_size: int, pad_id: int, target_vocab_size: int) -> Any:
        return self

    def scored_on(self: Any, other: Any) -> Any:
        return replace(self, validation=other.train)

    def verify(self) -> None:
        pass

    def verify_share(self, number: int, of: int) -> None:
        self.verify()

    def print_report(self) -> None:
        pass


class Preparation(Protocol):
    """Prepares the store, or stores, of one data config."""

    def check(self) -> None:
        """Raises UserError unless the store is finished or its source is found. Writes nothing."""

    def is_finished(self) -> bool:
        """Whether there is nothing left to prepare."""

    def run(self, compare: Compare = "sizes") -> Dataset:
        """Prepares the store, or opens it if it is finished. See `dataset.prepare`."""

    def begin(self) -> None:
        """Prepares what all jobs of `share` need."""

    def share(self, job: int, jobs: int) -> Dataset | None:
        """Prepares the share of one of several jobs. See `dataset.prepare_share`."""

    def open(self, compare: Compare = "nothing") -> Dataset:
        """Opens the finished store. Raises UserError if there is none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings that all kinds of data have. Creating one reads nothing."""

    store: str | None = None
    """Folder or bucket (gs://, s3://) of the prepared store. Default: a folder below
    $XDG_CACHE_HOME or ~/.cache, named by the content of the source and the settings."""

    prepare_processes: int | None = None
    """Number of processes that prepare the store. Default: one per core, or one for little data."""

    workers: int = 0
    """Worker processes per host that create training examples; 0 uses the training process."""

    max_training_examples: int | None = None
    """Train on so many examples, chosen by the seed of the run; of questions and long documents, so
    many with all of their windows; of pairs and conversations, so many that are then packed. None:
    all."""

    examples_per_class: int | None = None
    """Train on so many examples of each class, chosen by the seed of the run. None: all."""

    verify: bool = True
    """Read the whole store once when a run opens it and compare checksums (about a second per GB);
    for a store in a bucket, compare file sizes only (``prepare --verify`` reads it). False compares
    file sizes only."""

    RANGES: ClassVar[ranges.Ranges] = {
        "prepare_processes": ranges.integers(1, 4096),
        "workers": ranges.integers(0, 4096),
        "max_training_examples": ranges.integers(),
        "examples_per_class": ranges.integers(),
        "validation_fraction": ranges.RATE,
        "shards": ranges.integers(1, 99_999),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data")
        if self.max_training_examples is not None and self.examples_per_class is not None:
            raise UserError(
                "data.max_training_examples and data.examples_per_class exclude each other; set one"
            )

    @property
    def is_limited(self) -> bool:
        """Whether only a subset of the training examples is trained on."""
        return self.max_training_examples is not None or self.examples_per_class is not None

    @property
    def tokenizers(self) -> dict[str, TokenizerConfig]:
        """Configs of the tokenizers, by the name of their field."""
        return {}

    @property
    def image_channels(self) -> int | None:
        """Channels of the images; None for data without images."""
        return None

    @property
    def has_prepared_rows(self) -> bool:
        """Whether examples are rows already, which the objective does not prepare."""
        return False

    def preparation(
        self,
        output: str | os.PathLike[str] | None = None,
        of_run: Tokenizers = MappingProxyType({}),
    ) -> Preparation:
        """How the store is prepared, in ``output`` or else in ``store``.

        ``of_run``: tokenizers to use instead of training new ones."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is prepared")

    def former_stores(self, of_run: Tokenizers) -> Iterable[str]:
        """Default folders of finished stores that earlier versions made of the same source."""
        return ()

    def of_evaluation_set(self, one: EvaluationSet, label_names: tuple[str, ...] = ()) -> Any:
        """The data of an evaluation set, with these settings; `Dataset.scored_on` opens it.

        ``label_names``: the classes of the training data. Raises UserError for data that is not
        read from a source."""
        named = {field.name for field in fields(self)}
        if not {"source", "validation_source"} <= named:
            raise UserError(
                f"evaluation.sets has {one.name!r}, but a {type(self).__name__} reads no source; "
                "leave evaluation.sets empty"
            )
        source: Any = one.source
        wanted: type[Any] = type(getattr(self, "source", None))
        if not isinstance(source, wanted):
            raise UserError(
                f"the source of the evaluation set {one.name!r} is a {type(source).__name__}; give "
                f"a {wanted.__name__}, as the training data has"
            )
        if label_names and source.label_names == ():
            source = replace(source, label_names=label_names)
        store = None if self.store is None else f"{self.store}/sets/{one.name}"
        changes = {"source": source, "validation_source": None, "validation_fraction": 0.0}
        return replace(self, store=store, **changes)

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        """Raises UserError if the data cannot give the examples of ``spec``. Reads nothing.

        ``objective``: its name, for the message."""

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        """A raw example without content, in the form of `Dataset.examples`.

        ``token``: an ordinary token id, for text."""
        raise NotImplementedError(f"{type(self).__name__} has no dummy example")
