"""Images in tables: rows of parquet files, and examples prepared by TFDS."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flax_transformers.data.images.captions import CAPTIONED, captions_in
from flax_transformers.data.images.kinds import (
    FoundImage,
    ImageSource,
    files_of_split,
    split_of_path,
)
from flax_transformers.data.sources.documents import listed
from flax_transformers.data.sources.row_files import reading_parquet
from flax_transformers.data.sources.tfds import split_of, tfds_builder, tfds_files
from flax_transformers.errors import UserError


class ParquetImages:
    """Parquet files with a column of encoded images and one of labels, as on Hugging Face."""

    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    in_place = False

    def __init__(self, source: ImageSource, root: Path, files: Sequence[Path]) -> None:
        self._files, self._source = files_of_split(source, root, files, "parquet"), source
        self._columns = [source.image_field, source.caption_field or source.label_field]
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, rows
        for path in self._files:
            with _parquet(path) as file:
                self._check_columns(path, file.schema_arrow)
                self.classes = self.classes or _class_names(file.schema_arrow, source.label_field)
                groups = range(file.num_row_groups)
                self._groups += [(path, n, file.metadata.row_group(n).num_rows) for n in groups]
        self._names: dict[str, int] = {name: number for number, name in enumerate(self.classes)}
        if source.caption_field:
            self.classes = CAPTIONED
        elif not self.classes:
            self._number_labels(_training_files(source, root, files) or self._files)

    def _check_columns(self, path: Path, schema: Any) -> None:
        for column in self._columns:
            if column not in schema.names:
                raise UserError(
                    f"The parquet file {path} has no column {column!r}, it has "
                    f"{listed(schema.names)}; set data.source.image_field and label_field or "
                    "caption_field."
                )

    def _number_labels(self, training: Sequence[Path]) -> None:
        """Derives the classes from the labels: numbers from 0, or the sorted names of the
        ``training`` files."""
        values = self._labels(self._files)
        if all(isinstance(value, int) for value in values):
            self.classes = tuple(map(str, range(max(values, default=-1) + 1)))
            return
        known = values if training == self._files else self._labels(training)
        if unknown := sorted(map(str, values - known)):
            raise UserError(
                f"The images of the split {self._source.split!r} of {self._source.path} have a "
                f"class {unknown[0]!r} that the training images do not have; leave them out."
            )
        self.classes = tuple(sorted(map(str, known)))
        self._names = {name: number for number, name in enumerate(self.classes)}

    def _labels(self, files: Sequence[Path]) -> set[Any]:
        found: set[Any] = set()
        for path in files:
            with _parquet(path) as file:
                column = self._source.label_field
                found |= set(file.read([column]).column(column).unique().to_pylist())
        return found - {None}

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self._groups)

    def read(self, start: int, stop: int) -> Iterator[FoundImage]:
        first = 0
        for path, group, rows in self._groups:
            wanted = range(max(start, first) - first, min(stop, first + rows) - first)
            if wanted:
                with _parquet(path) as file:
                    images, labels = file.read_row_group(group, columns=self._columns).select(
                        self._columns
                    )
                for row in wanted:
                    raw, label = images[row].as_py(), labels[row].as_py()
                    raw = raw.get("bytes") if isinstance(raw, dict) else raw
                    raw = raw if isinstance(raw, bytes) else b""
                    if self._source.caption_field:
                        yield FoundImage(f"row {first + row}", raw, 0, captions_in(label))
                        continue
                    number = label if isinstance(label, int) else self._names.get(str(label), -1)
                    yield FoundImage(f"row {first + row}", raw, number)
            first += rows

    def files(self) -> list[tuple[str, Path]]:
        return [(path.suffix, path) for path in self._files]


def _training_files(source: ImageSource, root: Path, files: Sequence[Path]) -> list[Path]:
    """The files of the training split, if files are named by splits."""
    return [path for path in files if split_of_path(root, path, source.split) == "train"]


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """An open parquet file; errors are raised as UserError."""
    from pyarrow import parquet  # slow to import

    with reading_parquet(path), parquet.ParquetFile(path) as file:
        yield file


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """The names that Hugging Face's `datasets` stores in a file."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, noted["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


class RecordImages:
    """Encoded images prepared by TFDS."""

    shape: tuple[int, ...] | None = None
    in_place = True

    def __init__(self, source: ImageSource) -> None:
        import tensorflow_datasets as tfds

        self._source, builder = source, tfds_builder(source.path)
        features = dict(builder.info.features or {})
        for feature in (source.image_field, source.label_field):
            if feature not in features:
                raise UserError(
                    f"{source.path} has no feature {feature!r}, it has {listed(features)}; set "
                    "data.source.image_field and label_field."
                )
        label = features[source.label_field]
        self.classes = tuple(getattr(label, "names", None) or ())
        if not self.classes:
            raise UserError(
                f"The feature {source.label_field!r} of {source.path} is not a class; set "
                "data.source.label_field."
            )
        skip = {source.image_field: tfds.decode.SkipDecoding()}
        self._rows = split_of(source.path, builder, source.split, decoders=skip)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[FoundImage]:
        for number in range(start, min(stop, len(self))):
            try:
                row = self._rows[number]
                raw, label = row[self._source.image_field], int(row[self._source.label_field])
            except (OSError, RuntimeError, ValueError):
                raw, label = b"", 0
            yield FoundImage(str(number), raw, label)

    def bytes_at(self, place: str) -> bytes:
        """The image with that index."""
        raw: bytes = self._rows[int(place)][self._source.image_field]
        return raw

    def files(self) -> list[tuple[str, Path]]:
        return tfds_files(self._source.path, self._source.split)
