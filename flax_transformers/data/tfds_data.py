"""Data that TFDS has prepared, read at random and without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flax_transformers.data.documents import Source, listed
from flax_transformers.data.records import Record
from flax_transformers.data.tfds_needs import how_to_prepare
from flax_transformers.errors import UserError

PREFIX = "tfds:"
_ROWS = 64


@dataclass(frozen=True)
class Examples:
    """A record is an example: a dict of its features. Positions are numbers of examples.

    Raises UserError for data that is not prepared, a split or one of ``features`` it lacks, and
    what cannot be read.
    """

    source: Source
    features: tuple[str, ...]

    @cached_property
    def builder(self) -> Any:
        """TFDS's reader of the data."""
        return tfds_builder(self.source.path)

    @cached_property
    def _data(self) -> Any:
        path, split, info = self.source.path, self.source.split, self.builder.info
        present = list(info.features or ())
        for feature in self.features:
            if feature not in present:
                raise UserError(
                    f"{path} has no feature {feature!r}, it has {listed(present)}; name one of "
                    "them in the source's fields."
                )
        try:
            return self.builder.as_data_source(split=split)
        except ValueError as error:
            raise UserError(
                f"{path} has no split {split!r}; its splits are {listed(info.splits)}, and slices "
                "such as 'train[:10%]' work."
            ) from error

    @property
    def size(self) -> int:
        return len(self._data)

    def solid(self, position: int) -> tuple[int, int]:
        return position, position

    def read(self, start: int, stop: int | None) -> Iterator[Record]:
        path = self.source.path
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
                yield Record(number, row, f"Example {number} of {path}")


def tfds_text(row: dict[str, Any], feature: str, source: Source) -> bytes:
    """The text of a row. Raises UserError for a feature that is none."""
    raw = row[feature]
    if not isinstance(raw, bytes):
        raise UserError(
            f"The feature {feature!r} of {source.path} is a {type(raw).__name__}, not text; name "
            "a text feature in the source's fields."
        )
    return raw


def tfds_identity(source: Source) -> str:
    """The full name of the data, the split asked for and all sizes."""
    info = tfds_builder(source.path).info
    lengths = {name: split.shard_lengths for name, split in sorted(info.splits.items())}
    return repr((info.full_name, source.split, lengths))


def tfds_files(path: str, split: str) -> list[tuple[str, Path]]:
    """(name, path) of the files that hold the splits named in ``split``, sorted; none of those in
    a bucket, which are known by `tfds_identity` alone."""
    builder = tfds_builder(path)
    folder = os.fspath(builder.data_path)
    if "://" in folder:
        return []
    files = sorted(file for file in Path(folder).iterdir() if ".array_record" in file.name)
    names = [name for name in builder.info.splits if name in split]
    chosen = [file for file in files if any(f"-{name}.array_record" in file.name for name in names)]
    return [(file.name, file) for file in chosen or files]


def tfds_builder(path: str) -> Any:
    """The prepared data's reader. Its builder code is not needed, so nothing is imported for it."""
    import tensorflow_datasets as tfds  # 1 s, only for those who use it

    name = path.removeprefix(PREFIX)
    try:
        if name.startswith(("/", ".", "~")) or "://" in name:
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            dataset, options = tfds.core.naming.parse_builder_name_kwargs(name)
            builder = tfds.core.read_only_builder.builder_from_files(str(dataset), **options)
    except Exception as error:  # protobuf and TFDS have errors of their own for damaged files
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
