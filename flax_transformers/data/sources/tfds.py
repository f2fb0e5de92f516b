"""Data prepared by TFDS, read with random access and without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformers.data.sources.documents import listed
from flax_transformers.data.sources.records import Record, Source
from flax_transformers.errors import UserError

PREFIX = "tfds:"
_ROWS = 64
_PLAIN_MODULES = {
    "glue": "tensorflow_datasets.text.glue",
    "squad": "tensorflow_datasets",
    "wmt14_translate": "tensorflow_datasets.translate.wmt14",
    "wmt16_translate": "tensorflow_datasets.translate.wmt16",
    "xnli": "tensorflow_datasets.text.xnli",
}
"""Builders that need no TensorFlow, and the module to import so that TFDS finds them."""

_BEAM = ("c4", "wikipedia")
_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}


@dataclass(frozen=True)
class TfdsExamples:
    """A record is an example: a dict of the features of ``texts`` and ``others`` as Python values.
    Positions are indices of examples.

    Raises UserError for data that is not prepared, a missing split or feature, ``texts`` that are
    not text, and unreadable files.
    """

    source: Source
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()

    @cached_property
    def builder(self) -> Any:
        """The builder that reads the data."""
        return tfds_builder(self.source.path)

    @cached_property
    def _data(self) -> Any:
        path, split = self.source.path, self.source.split
        for feature in (*self.texts, *self.others):
            found = self._feature(feature)
            kind = found.np_dtype if isinstance(found.np_dtype, dict) else np.dtype(found.np_dtype)
            if feature in self.texts and kind != np.dtype("O"):
                raise UserError(
                    f"The feature {feature!r} of {path} is a {kind}, not text; "
                    "name a text feature in the source's fields."
                )
        return split_of(path, self.builder, split)

    def _feature(self, name: str) -> Any:
        """The feature of a field, which may be nested. Raises UserError."""
        found = self.builder.info.features
        present = list(found or ())
        for key in [name] if name in present else name.split("."):
            found = getattr(found, "feature", found)  # of a sequence
            if key not in (found.keys() if hasattr(found, "keys") else ()):
                raise UserError(
                    f"{self.source.path} has no feature {name!r}, it has {listed(present)}; name "
                    "one of them in the source's fields."
                )
            found = found[key]
        return found

    def class_names(self, name: str) -> list[str] | None:
        """The names of a feature's classes, by number; None without names."""
        return getattr(self._feature(name), "names", None)

    @property
    def size(self) -> int:
        return len(self._data)

    def solid(self, position: int) -> tuple[int, int]:
        return position, position

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        path = self.source.path
        fields = (*self.texts, *self.others)
        present = self.builder.info.features
        names = dict.fromkeys(f if f in present else f.split(".")[0] for f in fields)
        stop = self.size if stop is None else min(stop, self.size)
        for first in range(start, stop, _ROWS):
            chosen = range(first, min(first + _ROWS, stop))
            try:
                rows = self._data.__getitems__(list(chosen))
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"Cannot read {path} near example {first} ({error}); prepare it again."
                ) from error
            for number, row in zip(chosen, rows, strict=True):
                found = {name: _as_python(row[name]) for name in names}
                yield Record(number, found, f"Example {number} of {path}")


def split_of(path: str, builder: Any, split: str, **options: Any) -> Any:
    """Random access to a split. ``options``: of TFDS. Raises UserError if it does not exist."""
    try:
        return builder.as_data_source(split=split, **options)
    except ValueError as error:
        raise UserError(
            f"{path} has no split {split!r}; its splits are {listed(builder.info.splits)}, and "
            "slices such as 'train[:10%]' work."
        ) from error


def _as_python(value: Any) -> Any:
    """Numpy arrays and scalars as lists and numbers."""
    if isinstance(value, Mapping):
        return {name: _as_python(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def tfds_identity(source: Source) -> str:
    """The full name of the data, the split and all sizes."""
    info = tfds_builder(source.path).info
    lengths = {name: split.shard_lengths for name, split in sorted(info.splits.items())}
    return repr((info.full_name, source.split, lengths))


def tfds_files(path: str, split: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of the splits named in ``split``, sorted; empty for data in a
    bucket, which is identified by `tfds_identity` only."""
    builder = tfds_builder(path)
    folder = os.fspath(builder.data_path)
    if "://" in folder:
        return []
    files = sorted(file for file in Path(folder).iterdir() if ".array_record" in file.name)
    names = [name for name in builder.info.splits if name in split]
    chosen = [file for file in files if any(f"-{name}.array_record" in file.name for name in names)]
    return [(file.name, file) for file in chosen or files]


def tfds_builder(path: str) -> Any:
    """The builder that reads prepared data. The code that prepared it is not imported."""
    import tensorflow_datasets as tfds  # takes 1 s

    name = path.removeprefix(PREFIX)
    try:
        if name.startswith(("/", ".", "~")) or "://" in name:
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            dataset, options = tfds.core.naming.parse_builder_name_kwargs(name)
            builder = tfds.core.read_only_builder.builder_from_files(str(dataset), **options)
    except Exception as error:  # protobuf and TFDS raise different errors for damaged files
        if _is_there(name):
            raise UserError(
                f"The data in {name} is damaged ({' '.join(str(error).split())}); prepare it again."
            ) from error
        raise UserError(
            f"{path} is not prepared here (TFDS looks in {tfds.core.constants.DATA_DIR}; "
            f"TFDS_DATA_DIR sets another folder); {how_to_prepare(name)}."
        ) from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{path} is stored as {builder.info.file_format.value}, which cannot be read "
            "at random without TensorFlow or loss; prepare it with --file_format=array_record."
        )
    return builder


def _is_there(folder: str) -> bool:
    return os.path.exists(os.path.join(os.path.expanduser(folder), "dataset_info.json"))


def how_to_prepare(name: str) -> str:
    """How to prepare "glue/mnli", "wikipedia/20230601.en" or "c4:3.1.0": the end of a message with
    the requirements and the command. As of tensorflow-datasets 4.9.10."""
    builder = name.split("/")[0].split(":")[0]
    if builder in _PLAIN_MODULES:
        modules = dict.fromkeys((_PLAIN_MODULES[builder], "tensorflow_datasets"))
        return (
            "this environment can prepare it, without TensorFlow: "
            f'`python -c "import {", ".join(modules)}; tensorflow_datasets.builder({name!r}, '
            "file_format='array_record').download_and_prepare()\"`"
        )
    command = f"`tfds build {name} --file_format=array_record`"
    extra = "install the extra 'prepare' in an environment of its own"
    if builder in _BEAM:
        return f"it needs TensorFlow and a Beam pipeline: {extra} and run {command} there"
    if builder in _ARCHIVES:
        archives = " and ".join(_ARCHIVES[builder])
        return (
            f"it needs TensorFlow, and {archives} in downloads/manual of the TFDS folder, "
            "because they cannot be downloaded without an account: "
            f"{extra} and run {command} there"
        )
    return f"it may need TensorFlow: {extra} and run {command} there"
