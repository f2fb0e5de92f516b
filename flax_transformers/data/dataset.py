"""Prepared data as training and evaluation see it, whatever kind it is of."""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import Protocol

from flax_transformers.data.config import DataConfig, TextData
from flax_transformers.data.images.dataset import (
    ImageData,
    PreparedImages,
    begin_images,
    open_prepared_images,
    prepare_image_parts,
    prepare_images,
)
from flax_transformers.data.mixture import (
    MixedText,
    PreparedMixture,
    begin_mixture,
    open_mixture,
    prepare_mixture,
    prepare_mixture_shards,
)
from flax_transformers.data.pipeline.loader import Examples
from flax_transformers.data.prepare.cached_stores import Tokenizers
from flax_transformers.data.prepare.report import say_report
from flax_transformers.data.prepare.store_locks import Compare
from flax_transformers.data.prepare.text import (
    PreparedText,
    begin_text,
    open_prepared,
    prepare_shards,
    prepare_text,
)
from flax_transformers.data.sequences import GeneratorBatches, PythonData, SequenceDataset
from flax_transformers.data.store.token_store import Split
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.storage.folders import open_folder

__all__ = ["GeneratorBatches", "PythonData", "SequenceDataset"]


class Dataset(Protocol):
    """What a run reads. ``prepare`` made it, or this process did at the start of the run."""

    @property
    def directory(self) -> str:
        """Where it lies, for messages."""

    @property
    def fingerprint(self) -> str:
        """Hash of the training examples: a run goes on only with the data it began with."""

    @property
    def known_as(self) -> tuple[str, ...]:
        """Fingerprints that earlier versions gave the same examples."""

    @property
    def summary(self) -> str:
        """How much there is of what, in a few words."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Kept with every checkpoint; None for data without text."""

    @property
    def target_tokenizer(self) -> Tokenizer | None:
        """That of the targets of pairs, where ``tokenizer`` is of the sources alone; kept too."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What objectives know of the tokenizers."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes of labelled data, in the order of their numbers; else none."""

    def examples(self, split: Split, spec: WindowSpec) -> Examples | None:
        """Raw examples as an objective asks for them; None where nothing is held out.

        Raises UserError where the data cannot give such examples.
        """


def prepare(
    data: DataConfig,
    output: str | os.PathLike[str] | None = None,
    *,
    of_run: Tokenizers = MappingProxyType({}),
    compare: Compare = "sizes",
) -> Dataset:
    """Makes what a run reads, in ``output`` or ``data.store``, or opens it where it is finished.

    Where text has to be tokenized, the tokenizers ``of_run`` are used instead of training others. A
    finished store is enough; with ``compare`` its source, if at hand, must have the sizes, or for
    text the content, that it was made from. Raises UserError for data that is missing, damaged or
    empty.
    """
    if isinstance(data, ImageData):
        return prepare_images(data, output, compare=compare)
    if isinstance(data, MixedText):
        return prepare_mixture(data, output, of_run=of_run, compare=compare)
    return prepare_text(_text(data), output, of_run=of_run, compare=compare)


def begin(data: DataConfig, output: str | os.PathLike[str] | None = None) -> None:
    """Makes what all jobs of `prepare_share` need, such as the tokenizer, in one process."""
    if isinstance(data, ImageData):
        begin_images(data, output)
    elif isinstance(data, MixedText):
        begin_mixture(data, output)
    else:
        begin_text(_text(data), output)


def prepare_share(
    data: DataConfig, output: str | os.PathLike[str] | None, job: int, jobs: int
) -> Dataset | None:
    """One job's share of the work, jobs counting from 0; the last one to finish has it all.

    Raises UserError for a job that does not exist, and for text where `begin` has not run. (For
    images it need not, but then jobs with other settings are not kept apart at the very start.)
    """
    if output is None and data.store is None:
        raise UserError(
            "Jobs that prepare a store together need one place for it; set data.store or --output"
        )
    if isinstance(data, ImageData):
        return prepare_image_parts(data, output, job, jobs)
    if isinstance(data, MixedText):
        return prepare_mixture_shards(data, output, job, jobs)
    return prepare_shards(_text(data), output, job, jobs)


def parts_of(prepared: Dataset) -> tuple[tuple[str, Dataset], ...]:
    """The components of a mixture with their names; other data alone, under the name ""."""
    if isinstance(prepared, PreparedMixture):
        return tuple(zip(prepared.names, prepared.parts, strict=True))
    return (("", prepared),)


def verify(prepared: Dataset) -> None:
    """Reads every file of the stores and compares digests. Raises UserError naming a damaged one.

    Opening a local store does so too, unless ``data.verify`` is False.
    """
    for _, part in parts_of(prepared):
        assert isinstance(part, PreparedText | PreparedImages)
        for store in (part.train, part.validation):
            if store is not None:
                store.verify()


def say_reports(prepared: Dataset) -> None:
    """Prints what the reports of stores of text have to say, as `prepare` does."""
    for _, part in parts_of(prepared):
        if isinstance(part, PreparedText):
            say_report(open_folder(part.directory))


def open_dataset(data: DataConfig, *, of_run: Tokenizers = MappingProxyType({})) -> Dataset:
    """What ``prepare`` has finished. Raises UserError where it has not.

    For several processes at once, none of which may start to write. Nothing is compared with the
    source.
    """
    if isinstance(data, ImageData):
        return open_prepared_images(data)
    if isinstance(data, MixedText):
        return open_mixture(data, of_run=of_run)
    return open_prepared(_text(data), of_run=of_run)


def _text(data: DataConfig) -> TextData:
    if not isinstance(data, TextData):
        raise UserError(
            f"the config's data is a {type(data).__name__}; this wants a TextData or a MixedText"
        )
    return data


def training_examples(prepared: Dataset, spec: WindowSpec) -> Examples:
    """The training split. Raises UserError if there is none."""
    examples = prepared.examples("train", spec)
    if examples is None:
        raise UserError(f"{prepared.directory} holds nothing to train on; check the data source")
    return examples
