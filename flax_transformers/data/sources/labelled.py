"""Labelled texts: one or two texts with a class or a number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from flax_transformers.data.sources import row_files
from flax_transformers.data.sources.documents import (
    Decoder,
    Document,
    Invalid,
    LabelKind,
    Where,
)
from flax_transformers.data.sources.records import Part, Source
from flax_transformers.data.sources.row_files import row_file, row_of, text_in, value_in
from flax_transformers.data.sources.tfds import PREFIX, Examples


@dataclass(frozen=True)
class LabelledSource(Source):
    """A corpus of labelled texts; used like a `TextSource` (``TextData.source``).

    ``path``: a file, a folder or a glob of jsonl or ndjson, json (an object per line, one list of
    rows, or one object with a list of rows, or one list per split), csv, tsv (no quotes) and
    parquet files, all but the last also compressed as .gz, .bz2, .xz or .zst; or "tfds:..." as for
    text.
    ``split``: of TFDS, or of a json file with named splits.
    ``text_field``, ``second_field``, ``label_field``: JSON keys, parquet columns, TFDS features, or
    names in the first row of csv and tsv; "a.b" is field b of the object a. If all are numbers:
    columns from 0 of csv and tsv files without such a row, or indices of rows that are JSON lists.
    ``second_field`` None: one text.
    ``label``: the name of a class (integers are names too), or a number for regression.
    ``label_names``: the classes in the order of their numbers; default: those of the training
    documents, sorted.

    A row without a label, with one text of two, or with an unknown class is invalid.
    """

    text_field: str = "text"
    second_field: str | None = None
    label_field: str = "label"
    label: Literal["class", "number"] = "class"
    label_names: tuple[str, ...] = ()

    endings: ClassVar[tuple[str, ...]] = row_files.ENDINGS

    @property
    def texts(self) -> int:
        return 1 if self.second_field is None else 2

    @property
    def label_kind(self) -> LabelKind:
        return "classes" if self.label == "class" else "numbers"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the texts, and of the label last."""
        second = () if self.second_field is None else (self.second_field,)
        return (self.text_field, *second, self.label_field)

    def parts(self) -> Iterator[Part]:
        *texts, label = self.fields
        if self.path.startswith(PREFIX):
            examples = Examples(self, tuple(texts), (label,))
            yield Part(examples, partial(_row, self, examples.class_names(label)))
            return
        for _, path in self.files():
            yield Part(row_file(path, self.split, texts, (label,)), partial(_row, self, None))


def _row(
    source: LabelledSource,
    names: Sequence[str] | None,
    decoder: Decoder,
    content: Any,
    where: Where,
) -> Document:
    """``names``: names of the classes in the data, by number."""
    row = row_of(decoder, content, where)
    texts = [text_in(decoder, row, field, where) for field in source.fields[:-1]]
    label = value_in(row, source.label_field, where)
    if names is not None and isinstance(label, int):
        label = names[int(label)] if label >= 0 else None  # -1: not labelled
    elif isinstance(label, bytes):
        label = decoder.text(label, where)
    return _document(texts, label, source, where)


def _document(texts: Sequence[str], label: Any, source: LabelledSource, where: Where) -> Document:
    sides = tuple(text.strip() for text in texts)
    if any(sides) and not all(sides):
        raise Invalid(where, "has one text of two")
    if source.label == "number":
        return Document(sides, (_number(label, where),))
    return Document(sides, (class_name(label, where),))


def class_name(label: Any, where: Where) -> str:
    """The name of a class as stored. Raises `Invalid` for other values."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):  # tables with missing labels contain integers as floats
        label = int(label) if label.is_integer() else label if math.isfinite(label) else None
    name = str(label).strip() if isinstance(label, (str, int, float)) else ""
    if not name or not name.isprintable():
        raise Invalid(where, f"has no label: {label!r} is not the name of a class")
    return name


def _number(label: Any, where: Where) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Invalid(where, f"has no label: {label!r} is not a number")
    return number
