"""Prepared data as training and evaluation use it: prepare it, open it, verify it."""

from __future__ import annotations

import os
from types import MappingProxyType

from flax_transformers.data.base import Compare, DataConfig, Dataset, Tokenizers
from flax_transformers.data.pipeline.examples import Examples, Seed, subset
from flax_transformers.data.sequences import GeneratorBatches, PythonData, SequenceDataset
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec

__all__ = [
    "TOKENIZERS",
    "Dataset",
    "GeneratorBatches",
    "PythonData",
    "SequenceDataset",
    "open_dataset",
    "prepare",
    "prepare_common",
    "prepare_share",
    "tokenizers",
    "training_examples",
]

TOKENIZERS = ("tokenizer", "target_tokenizer")
"""Names of the folders of tokenizers, in stores and in checkpoints."""


def prepare(
    data: DataConfig,
    output: str | os.PathLike[str] | None = None,
    *,
    of_run: Tokenizers = MappingProxyType({}),
    compare: Compare = "sizes",
) -> Dataset:
    """Prepares the store of ``data``, in ``output`` or ``data.store``, or opens it if it is
    finished.

    ``of_run``: tokenizers to use instead of training new ones. ``compare``: what of the source must
    be unchanged since a finished store was prepared, if the source still exists. May be killed at
    any time and called again, also while another process does the same. Prints progress on stderr.
    Raises UserError for a source that is missing, damaged or empty, a folder that contains another
    store, and a disk that is full or read-only.
    """
    return data.preparation(output, of_run).run(compare)


def prepare_common(data: DataConfig, output: str | os.PathLike[str] | None = None) -> None:
    """Prepares what all jobs of `prepare_share` need, such as the tokenizer, in one process."""
    data.preparation(output).begin()


def prepare_share(
    data: DataConfig, output: str | os.PathLike[str] | None, job: int, jobs: int
) -> Dataset | None:
    """Prepares the share of one of several jobs, numbered from 0; None until all are finished.

    The job that finishes last also finishes the store. Raises UserError if there are more jobs than
    ``data.shards``, and for text if `prepare_common` has not run.
    """
    if output is None and data.store is None:
        raise UserError(
            "Jobs that prepare a store together need one place for it; set data.store or --output"
        )
    return data.preparation(output).share(job, jobs)


def open_dataset(
    data: DataConfig,
    *,
    of_run: Tokenizers = MappingProxyType({}),
    compare: Compare = "nothing",
) -> Dataset:
    """The finished store of ``data``. Raises UserError if it is not finished.

    For several processes at once, none of which may write. ``compare``: see `prepare`.
    """
    return data.preparation(None, of_run).open(compare)


def tokenizers(prepared: Dataset) -> dict[str, Tokenizer]:
    """The tokenizers of the data, by the names of their folders."""
    both = zip(TOKENIZERS, (prepared.tokenizer, prepared.target_tokenizer), strict=True)
    return {name: tokenizer for name, tokenizer in both if tokenizer is not None}


def training_examples(
    prepared: Dataset, spec: WindowSpec, data: DataConfig | None = None, seed: Seed = 0
) -> Examples:
    """The examples of the training split, or the subset that ``data`` asks for, chosen by ``seed``.

    Raises UserError if there are none, or not enough of a class.
    """
    examples = prepared.examples("train", spec)
    if examples is None:
        raise UserError(f"{prepared.directory} has nothing to train on; check the data source")
    if data is None or not data.is_limited:
        return examples
    count, per_class = data.max_training_examples, data.examples_per_class
    return subset(examples, count, per_class, prepared.label_names, seed)
