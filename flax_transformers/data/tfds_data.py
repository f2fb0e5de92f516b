"""Data that TFDS has prepared, read at random and without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from flax_transformers.data.documents import Source, listed
from flax_transformers.data.tfds_needs import how_to_prepare
from flax_transformers.errors import UserError

PREFIX = "tfds:"
_ROWS = 64


def tfds_rows(
    source: Source, features: Sequence[str], shard: int = 0, shards: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of the rows whose number % shards == shard; it reads no others.

    Raises UserError for data that is not prepared, a split or one of ``features`` it lacks, and
    what cannot be read.
    """
    builder = tfds_builder(source.path)
    present = list(builder.info.features or ())
    for feature in features:
        if feature not in present:
            raise UserError(
                f"{source.path} has no feature {feature!r}, it has {listed(present)}; name one of "
                "them in the source's fields."
            )
    try:
        data = builder.as_data_source(split=source.split)
    except ValueError as error:
        raise UserError(
            f"{source.path} has no split {source.split!r}; its splits are "
            f"{listed(builder.info.splits)}, and slices such as 'train[:10%]' work."
        ) from error
    numbers = range(shard, len(data), shards)
    for first in range(0, len(numbers), _ROWS):
        chosen = list(numbers[first : first + _ROWS])
        try:
            rows = data.__getitems__(chosen)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Cannot read {source.path} near example {chosen[0]} ({error}); prepare it again."
            ) from error
        yield from zip(chosen, rows, strict=True)


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
    """What changes when the data does: its full name, the split asked for and all sizes."""
    info = tfds_builder(source.path).info
    lengths = {name: split.shard_lengths for name, split in sorted(info.splits.items())}
    return repr((info.full_name, source.split, lengths))


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
