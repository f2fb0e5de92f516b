"""Rows to predict from: the texts of a file, without labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import Decoder, Document, Invalid, Where
from flax_transformers.data.sources.files import open_decompressed, reading_source
from flax_transformers.data.sources.labelled import ChoiceSource, chosen
from flax_transformers.data.sources.records import Part, TextFile
from flax_transformers.data.sources.row_files import ENDINGS, row_file, row_of, text_in, value_in
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.errors import UserError

_MARK = "\N{COMBINING GRAVE ACCENT}"  # stands for all marks, of which `re` has no class
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_WORD = re.compile(rf"\w[\w{_MARK}]*|[^\w\s]{_MARK}*")
_SPLIT = "train"

Words = Sequence[tuple[str, int, int]]


class InputRow(NamedTuple):
    """A row: its text, or several, and, of a row of words, each with its start and end.

    Of a question with choices: the ``context`` that all of them follow, the ``choices``, and the
    number of the right one, if it is known.
    """

    document: Document
    words: Words = ()
    context: str = ""
    choices: Sequence[str] = ()
    answer: int | None = None


@dataclass(frozen=True)
class Inputs:
    """A file of rows, described by plain values.

    ``path``: a .txt file with a text in each line, or a file in the formats of a `LabelledSource`,
    with the fields ``fields``. ``words``: whether the text is divided into words, which are runs of
    letters and digits and single other characters, each with the combining marks and joiners that
    follow; a field may hold a list of words instead, and the file may be one of a `TaggedSource`
    with this ``word_column``, whose tags are not read.
    ``questions``: whether a .json file is one of a `QuestionSource`. ``choices``: rows are those of
    this source, without their answers unless ``answers``.
    """

    path: str
    fields: tuple[str, ...] = ("text",)
    words: bool = False
    word_column: int = 1
    questions: bool = False
    choices: ChoiceSource | None = None
    answers: bool = False

    def rows(self) -> list[InputRow]:
        """All rows in order. Raises UserError, naming file and line, for a row that is invalid or
        has no text, and for a file without rows."""
        path, decoder = Path(self.path).expanduser(), Decoder(replace=False)
        if not path.is_file():
            if path.exists() and not path.is_dir():
                raise UserError(
                    f"{path} is a pipe or a device, which is not read; write the rows to a file, "
                    "and give --input that"
                )
            raise UserError(f"there is no file {path}; give --input a file of rows")
        found: list[InputRow] = []
        for part in self._parts(path):
            for record in part.records.read(0, None):
                try:
                    if self.choices is not None:
                        row = row_of(decoder, record.content, record.where)
                        found.append(self._choice_row(self.choices, decoder, row, record.where))
                        continue
                    document = part.parse(decoder, record.content, record.where)
                    found.append(self._row(document, record.where))
                except Invalid as problem:
                    hint = "fix it, or leave the row out"
                    if "has no field" in str(problem):
                        hint = "name the fields of the texts with --text-field, --second-field"
                    raise UserError(f"{problem}; {hint}") from problem
        if not found:
            raise UserError(f"{path} holds no rows; give --input a file with at least one")
        return found

    def _parts(self, path: Path) -> Iterator[Part]:
        kind = ending(path, (".txt", *ENDINGS, *TaggedSource.endings))
        if kind == ".txt":
            fields = (*self.fields, *(self.choices.choice_fields if self.choices else ()))
            if len(fields) > 1:
                raise UserError(
                    f"{path} holds one text a line, and the model reads {len(fields)}; give a "
                    f".jsonl file with the fields {' and '.join(fields)}"
                )
            yield Part(TextFile(path, "line"), _line)
        elif kind == ".json" and self.questions and not _is_lines(path):
            yield from QuestionSource(str(path)).parts()
        elif kind in ENDINGS:
            parse: Callable[..., Document] = _words if self.words else _texts
            others: tuple[str, ...] = ()
            if self.choices is not None:
                answer = (self.choices.label_field,) if self.answers else ()
                others = (*self.choices.choice_fields, *answer)
            yield Part(row_file(path, _SPLIT, self.fields, others), partial(parse, self.fields))
        elif kind is not None and self.words:
            source = TaggedSource(str(path), word_column=self.word_column)
            yield from source.parts(tagged=False)
        else:
            raise UserError(
                f"--input {path} is of no kind that is read; give a .txt file with a text in each "
                f"line, or one of {', '.join(ENDINGS)}"
            )

    def _choice_row(
        self, source: ChoiceSource, decoder: Decoder, row: Any, where: Where
    ) -> InputRow:
        texts, choices = source.texts_of(decoder, row, where)
        context = " ".join(text_in(decoder, row, field, where).strip() for field in source.fields)
        document = Document(tuple(text.replace("\0", " ") for text in texts), labels=("",))
        if not self.answers:
            return InputRow(document, (), context, choices)
        label = value_in(row, source.label_field, where)
        return InputRow(document, (), context, choices, chosen(label, choices, where))

    def _row(self, document: Document, where: Where) -> InputRow:
        texts = (document.text,) if isinstance(document.text, str) else document.text
        texts = tuple(text.replace("\0", " ") for text in texts)
        if not texts or not all(map(str.strip, texts)):
            raise Invalid(where, "has no text" if len(texts) < 2 else "has an empty text")
        if not self.words:  # as in training, where only contexts of answers keep their ends
            sides = texts if self.questions else tuple(map(str.strip, texts))
            return InputRow(Document(sides, labels=("",)))
        if document.words:
            ends = [sum(len(text) + 1 for text in texts[: i + 1]) - 1 for i in range(len(texts))]
            words = [(text, end - len(text), end) for text, end in zip(texts, ends, strict=True)]
        else:
            words = _words_in(texts[0])
        return InputRow(Document(tuple(w for w, _, _ in words), ("",), words=True), words)


def _words_in(text: str) -> list[tuple[str, int, int]]:
    """The words of a text with their start and end. Most scripts write vowels, tones or accents as
    marks of their own, and Persian and Hindi have joiners inside words."""
    marked = text
    if not text.isascii():
        marked = "".join(
            _MARK if one in _JOINERS or unicodedata.category(one)[0] == "M" else one for one in text
        )
    spans = (match.span() for match in _WORD.finditer(marked))
    return [(text[start:end], start, end) for start, end in spans]


def _is_lines(path: Path) -> bool:
    """Whether a .json file has an object in each line, and so is none of SQuAD's."""
    with reading_source(path), open_decompressed(path) as file:
        return b'"data"' not in file.read(1 << 12)


def _line(decoder: Decoder, raw: bytes, where: Any) -> Document:
    text = decoder.text(raw, where)
    return Document(text.removeprefix("\ufeff") if where.offset == 0 else text.strip("\r\n"))


def _texts(fields: Sequence[str], decoder: Decoder, content: Any, where: Where) -> Document:
    row = row_of(decoder, content, where)
    return Document(tuple(text_in(decoder, row, field, where) for field in fields))


def _words(fields: Sequence[str], decoder: Decoder, content: Any, where: Where) -> Document:
    row = row_of(decoder, content, where)
    if not isinstance(value := value_in(row, fields[0], where), list):
        return Document(text_in(decoder, row, fields[0], where))
    listed = [text_in(decoder, {"word": word}, "word", where) for word in value]
    return Document(tuple(listed), words=True)
