"""Labelled texts: one or two texts with a class or a number, and questions with choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from flax_transformers.data.sources import row_files
from flax_transformers.data.sources.documents import (
    LARGEST_NUMBER,
    Decoder,
    Document,
    Invalid,
    LabelKind,
    Where,
)
from flax_transformers.data.sources.records import Part, Source
from flax_transformers.data.sources.row_files import Row, row_file, row_of, text_in, value_in
from flax_transformers.data.sources.tfds import PREFIX, TfdsExamples
from flax_transformers.errors import UserError


@dataclass(frozen=True)
class LabelledSource(Source):
    """A corpus of labelled texts; used like a `TextSource` (``TextData.source``).

    ``path``: a file, a folder or a glob of jsonl or ndjson, json (an object per line, one list of
    rows, or one object with a list of rows, or one list per split), csv, tsv (no quotes) and
    parquet files, all but the last also compressed as .gz, .bz2, .xz or .zst; or "tfds:..." as for
    text.
    ``split``: as for a `TextSource`.
    ``text_field``, ``second_field``, ``label_field``: JSON keys, parquet columns, TFDS features, or
    names in the first row of csv and tsv; "a.b" is field b of the object a. If all are numbers:
    columns from 0 of csv and tsv files without such a row, or indices of rows that are JSON lists.
    ``second_field`` None: one text.
    ``label``: the name of a class (integers are names too), or a number for regression.
    ``label_names``: the classes in the order of their numbers; default: those of the TFDS feature,
    else those of the training documents, sorted.

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
    def store_version(self) -> int:  # type: ignore[override]
        """See `Source`; 2 where TFDS orders the classes, which version 1 sorted."""
        return 2 if self._ordered else 1

    @property
    def _ordered(self) -> bool:
        return self.path.startswith(PREFIX) and self.label == "class" and not self.label_names

    @property
    def known_classes(self) -> tuple[str, ...]:
        if not self._ordered:
            return self.label_names
        names = TfdsExamples(self, (), (self.label_field,)).class_names(self.label_field)
        return tuple(name.strip() for name in names or ())

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the texts, and of the label last."""
        second = () if self.second_field is None else (self.second_field,)
        return (self.text_field, *second, self.label_field)

    def parts(self) -> Iterator[Part]:
        *texts, label = self.fields
        if self.path.startswith(PREFIX):
            examples = TfdsExamples(self, tuple(texts), (label,))
            yield Part(examples, partial(_row, self, examples.class_names(label)))
            return
        listing = self.listing()
        for _, path in listing.files:
            rows = row_file(path, self.split, texts, (label,), inside=listing.inside)
            yield Part(rows, partial(_row, self, None))


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
    if not abs(number) <= LARGEST_NUMBER:
        raise Invalid(where, f"has no label: {label!r} is not a number of 32 bits")
    return number


@dataclass(frozen=True)
class ChoiceSource(Source):
    """A corpus of questions with several choices, of which one is right; used like a `TextSource`
    (``TextData.source``).

    ``path`` and ``split``: as of a `LabelledSource`, without TFDS.
    ``text_field``: the text that all choices share. ``question_field``: what begins each choice, as
    the second sentence of SWAG (arXiv:1808.05326) or the question about the article of RACE
    (arXiv:1704.04683); a choice takes the place of its "_", if it has one. None: choices alone.
    ``choice_fields``: one field with a list of texts, or a field for each choice.
    ``label_field``: which choice is right: its number from 0, its letter from A, or its text.

    Documents are the shared text, and each choice with the question. A row with fewer than two
    choices, with an empty text, or with an unknown answer is invalid.
    """

    text_field: str = "question"
    question_field: str | None = None
    choice_fields: tuple[str, ...] = ("choices",)
    label_field: str = "answer"

    label_kind: ClassVar[LabelKind] = "choices"
    endings: ClassVar[tuple[str, ...]] = row_files.ENDINGS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.choice_fields:
            raise UserError("data.source.choice_fields is empty; name the field of the choices")
        if self.path.startswith(PREFIX):
            raise UserError(f"a ChoiceSource reads files, but its path is {self.path}; give files")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the texts."""
        question = () if self.question_field is None else (self.question_field,)
        return (self.text_field, *question)

    def parts(self) -> Iterator[Part]:
        others = (*self.choice_fields, self.label_field)
        listing = self.listing()
        for _, path in listing.files:
            rows = row_file(path, self.split, self.fields, others, inside=listing.inside)
            yield Part(rows, self._document)

    def texts_of(
        self, decoder: Decoder, row: Row, where: Where
    ) -> tuple[tuple[str, ...], list[str]]:
        """The texts of a document, and the choices without the question. Raises `Invalid`."""
        shared, *question = (text_in(decoder, row, one, where).strip() for one in self.fields)
        choices = self._choices(decoder, row, where)
        if len(choices) < 2:
            raise Invalid(where, f"has {len(choices)} choices; at least two are needed")
        if not all((shared, *question, *choices)):
            raise Invalid(where, "has an empty text or choice")
        ends = [_with_question(question[0], one) if question else one for one in choices]
        return (shared, *ends), choices

    def _choices(self, decoder: Decoder, row: Row, where: Where) -> list[str]:
        if len(self.choice_fields) > 1:
            return [text_in(decoder, row, one, where).strip() for one in self.choice_fields]
        listed = value_in(row, self.choice_fields[0], where)
        if not isinstance(listed, list | tuple):
            raise Invalid(where, f"has no list of choices in {self.choice_fields[0]!r}")
        return [text_in(decoder, {"choice": one}, "choice", where).strip() for one in listed]

    def _document(self, decoder: Decoder, content: Any, where: Where) -> Document:
        row = row_of(decoder, content, where)
        texts, choices = self.texts_of(decoder, row, where)
        label = value_in(row, self.label_field, where)
        if isinstance(label, bytes):
            label = decoder.text(label, where)
        return Document(texts, (chosen(label, choices, where),))


def _with_question(question: str, choice: str) -> str:
    return question.replace("_", choice) if "_" in question else f"{question} {choice}"


def chosen(label: Any, choices: Sequence[str], where: Where) -> int:
    """The number of the right choice: ``label`` is it, its letter or its text.

    Raises `Invalid`, also for a text that is a choice and the number or the letter of another one.
    """
    text = str(label).strip()
    letters = [chr(ord("A") + place) for place in range(min(26, len(choices)))]
    numbers = list(map(str, range(len(choices))))
    readings = (numbers, letters, list(choices)) if isinstance(label, str) else (numbers,)
    found = {names.index(text) for names in readings if text in names}
    if isinstance(label, bool) or not found:
        raise Invalid(
            where, f"has the answer {label!r}, which is none of its {len(choices)} choices"
        )
    if len(found) > 1:
        raise Invalid(
            where,
            f"has the answer {label!r}, which is one of its choices and the place of another; give "
            "answers as whole numbers from 0",
        )
    return found.pop()
