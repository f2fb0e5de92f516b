"""Questions answered by spans of a text (SQuAD, arXiv:1606.05250, 1806.03822)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flax_transformers.data.sources.documents import Decoder, Document, Invalid, LabelKind, Where
from flax_transformers.data.sources.files import open_decompressed, reading_source
from flax_transformers.data.sources.records import Part, Source, ValueFile
from flax_transformers.data.sources.row_files import text_in
from flax_transformers.data.sources.tfds import PREFIX, TfdsExamples
from flax_transformers.errors import UserError

_TEXTS = ("id", "title", "context", "question")


@dataclass(frozen=True)
class QuestionSource(Source):
    """A corpus of questions; used like a `TextSource` (``TextData.source``).

    ``path``: a file, a folder or a glob of json files in the format of SQuAD 1.1 or 2.0,
    compressed or not, or "tfds:squad/...".

    Questions on articles with the same title are held out together. Without a title, the questions
    of one article are, and those of TFDS on one context. A question without answers is
    unanswerable. A question whose answer is not at its position in the text is invalid.
    """

    label_kind: ClassVar[LabelKind] = "spans"
    endings: ClassVar[tuple[str, ...]] = (".json",)
    splits_in_json: ClassVar[bool] = False
    store_version: ClassVar[int] = 2  # 1: articles without titles were held out as one

    def parts(self) -> Iterator[Part]:
        if self.path.startswith(PREFIX):
            yield Part(TfdsExamples(self, _TEXTS, ("answers",)), _example)
            return
        for _, path in self.files():
            yield Part(ValueFile(path, partial(_rows, self), "Question"), _question)


@dataclass(frozen=True)
class Question(Document):
    """A question (first text) on a context (second text).

    ``answers``: start and end of each answer in the context, in characters.
    """

    answers: tuple[tuple[int, int], ...] = ()
    name: str = ""
    """The question's id in the corpus."""

    @property
    def record(self) -> bytes:
        """The data for scoring an answer; see `question_of_record`."""
        fields = {"id": self.name, "question": self.text[0], "context": self.text[1]}
        return json.dumps({**fields, "answers": self.answers}, ensure_ascii=False).encode()


def question_of_record(record: bytes) -> Question:
    """The inverse of `Question.record`."""
    fields = json.loads(record)
    answers = tuple((start, end) for start, end in fields["answers"])
    return Question(
        (fields["question"], fields["context"]), answers=answers, name=str(fields["id"])
    )


def _rows(
    source: QuestionSource, path: Path
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(title, paragraph, question) of all questions of a file."""
    with reading_source(path), open_decompressed(path) as stream:
        raw = stream.read()
    try:
        errors = "replace" if source.on_invalid == "replace" else "strict"
        text = raw.decode(errors=errors).removeprefix("\ufeff")
        articles = json.loads(text)["data"]
        return [
            (str(article.get("title") or f"{path.name} {place}"), paragraph, question)
            for place, article in enumerate(articles)
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not in the format of SQuAD, data > paragraphs > qas "
            f"({type(error).__name__}: {error}); fix the file."
        ) from error


def _question(
    decoder: Decoder, row: tuple[str, Mapping[str, Any], Mapping[str, Any]], where: Where
) -> Question:
    title, paragraph, question = row
    if not isinstance(question, dict):
        raise Invalid(where, f"is a JSON {type(question).__name__}, not an object")
    context = text_in(decoder, dict(paragraph), "context", where)
    asked = text_in(decoder, question, "question", where)
    answers = () if question.get("is_impossible") else question.get("answers") or ()
    try:
        found = [(answer["answer_start"], answer["text"]) for answer in answers]
    except (TypeError, KeyError) as error:
        raise Invalid(where, "has an answer without answer_start or text") from error
    name = question.get("id", "")
    name = text_in(decoder, {"id": name}, "id", where) if isinstance(name, str) else str(name)
    return _checked(asked, context, found, title, name, where)


def _example(decoder: Decoder, row: Mapping[str, Any], where: Where) -> Question:
    name, title, context, asked = (decoder.text(row[field], where) for field in _TEXTS)
    starts, texts = row["answers"]["answer_start"], row["answers"]["text"]
    found = [
        (int(start), decoder.text(text, where)) for start, text in zip(starts, texts, strict=True)
    ]
    return _checked(asked, context, found, title or context, name, where)


def _checked(
    question: str,
    context: str,
    answers: Sequence[tuple[Any, Any]],
    title: str,
    name: str,
    where: Where,
) -> Question:
    if not question.strip() or not context.strip():
        raise Invalid(where, "has no question or no context")
    spans = []
    for start, text in answers:
        if not isinstance(start, int) or not isinstance(text, str) or not text.strip():
            raise Invalid(where, "has an answer with an invalid answer_start or text")
        if start < 0 or context[start : start + len(text)] != text:
            raise Invalid(where, f"is invalid: its answer {text!r} is not at character {start}")
        spans.append((start, start + len(text)))
    return Question((question, context), group=title, answers=tuple(spans), name=name)


def token_spans(spans: Sequence[tuple[int, int]], offsets: np.ndarray) -> np.ndarray:
    """The first and last token of each span of characters: int32 [spans, 2].

    ``offsets``: start and end of each token in the text, int [tokens, 2]. Spans without tokens are
    left out.
    """
    found = []
    for start, end in spans:
        touching = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
        if len(touching):
            found.append((touching[0], touching[-1]))
    return np.array(found, np.int32).reshape(-1, 2)
