"""Answered conversations for ``predict``, as reward models read them in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flax_transformers.data.inputs import InputRow, Inputs
from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import Decoder, Document, Invalid, Where
from flax_transformers.data.sources.row_files import row_of, text_in
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.examples import SingleTexts, TextRows
from flax_transformers.generation.prompts import require_known
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Vocabulary,
)
from flax_transformers.objectives.rows import padded_tokens
from flax_transformers.post_training.chat_data import encode
from flax_transformers.post_training.chat_template import TemplateError, template_of
from flax_transformers.post_training.conversations import FIELDS, Conversation, ConversationSource
from flax_transformers.post_training.reward_model import RewardModel, rewards

_TEXT = "text"
"""Field of a plain text."""


@dataclass(frozen=True)
class AnsweredRows:
    """A file of conversations in the shapes of a `ConversationSource`, each with one answer, or of
    plain texts of prompt and answer, in the field ``text_field`` or "text"."""

    path: str
    text_field: str | None = None

    def rows(self) -> list[InputRow]:
        """All rows in order. Raises UserError, naming file and line, for a row that is invalid or
        has several answers, and for a file without rows."""
        path = Path(self.path).expanduser()
        if self.text_field is not None or ending(path, ConversationSource.endings) is None:
            texts = Inputs(self.path, (self.text_field or _TEXT,)).rows()
            return [InputRow(_plain(row.document.text[0])) for row in texts]
        try:
            found = list(self._conversations(path))
        except Invalid as problem:
            raise UserError(f"{problem}; correct the row, or leave it out") from problem
        if not found:
            raise UserError(f"{path} holds no rows; give --input a file with at least one")
        return found

    def _conversations(self, path: Path) -> Iterator[InputRow]:
        decoder = Decoder(replace=False)
        for part in ConversationSource(str(path)).parts():
            for record in part.records.read(0, None):
                yield InputRow(_answered(part.parse, decoder, record.content, record.where))


def _answered(parse: Any, decoder: Decoder, content: Any, where: Where) -> Document:
    row = row_of(decoder, content, where)
    if isinstance(row, dict) and row.keys().isdisjoint(FIELDS) and _TEXT in row:
        text = text_in(decoder, row, _TEXT, where).strip()
        if not text:
            raise Invalid(where, "has no text")
        return _plain(text)
    found: Conversation = parse(decoder, content, where)
    if len(found.completions) != 1:
        raise Invalid(where, f"has {len(found.completions)} answers, of which one is scored")
    return found


def _plain(text: str) -> Conversation:
    return Conversation((text,), completions=(text,))


def answered_examples(texts: TextRows, length: int) -> SingleTexts:
    """The ids of each conversation by the tokenizer's template, of plain texts without it.

    Raises UserError for one that the template refuses, that has tokens without an embedding, or
    that has more than ``length`` tokens.
    """
    template, found = template_of(texts.tokenizer), []
    for number, row in enumerate(texts.rows, 1):
        assert isinstance(row.document, Conversation)
        try:
            (ids,), _ = encode(row.document, template, texts.tokenizer)
        except TemplateError as error:
            raise UserError(
                f"row {number} cannot be rendered: {error}; correct it, or leave it out"
            ) from error
        if len(ids) > length:
            raise UserError(
                f"row {number} has {len(ids)} tokens, but the model takes {length}; leave it out, "
                "or use another model"
            )
        what = f"text of row {number}"
        require_known(texts.tokenizer, ids.tolist(), texts.config.vocab_size, what)
        found.append(ids)
    return SingleTexts(found)


@dataclass(frozen=True)
class AnswerRewards:
    """The ``predict`` of the reward at the last token of each conversation."""

    needs: ClassVar[ModelNeeds] = RewardModel.needs

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``tokens`` as arrays int32 [T], and ``ends`` int32 [1], their number."""
        row = padded_tokens(example["tokens"], sequence_length, vocab)
        return row | {"ends": np.array([len(example["tokens"])], np.int32)}

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` float32 [B, 1]."""
        return {"predicted": rewards(model, params, batch)}
