"""Heads of models for ``predict``: the rows that each reads, and the JSON lines of its predictions.

`HEADS` is the one table, by type of the objective; a subclass has the entry of its nearest base. An
objective of the user's own may add one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from scipy.special import expit, softmax

from flax_transformers.data.inputs import InputRow, Inputs
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.sources.labelled import ChoiceSource
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.features.embedding import TextEmbedding, encoder_of
from flax_transformers.evaluation.prediction.answers import (
    AnsweredRows,
    AnswerRewards,
    answered_examples,
)
from flax_transformers.evaluation.prediction.examples import (
    TextRows,
    labelled_examples,
    text_examples,
)
from flax_transformers.evaluation.question_answering import best_answers
from flax_transformers.evaluation.scoring import continuations
from flax_transformers.evaluation.scoring.likelihood import (
    Likelihood,
    MaskedTokens,
    PseudoLikelihood,
    bytes_of_first,
    check_lengths,
    score_lines,
    six_digits,
)
from flax_transformers.evaluation.tagging import tagged_words
from flax_transformers.generation.prompts import noted_frame, require_known
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ProblemType, TextConfig, TransformerConfig
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives.base import Arrays, Frame
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.labelled import overhead
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.rows import bert_frame
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.post_training.reward_model import RewardModel

log = logging.getLogger(__name__)
_WINDOW_LENGTH = 384
"""Tokens of the windows of a text that is searched for answers (BERT on SQuAD)."""

Line = dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """A file of rows, and the names of fields that the user gives.

    ``source``: the source of the run's training data, whose fields are the defaults, or None.
    """

    path: str
    source: Any = None
    text_field: str | None = None
    second_field: str | None = None
    choice_fields: tuple[str, ...] = ()
    label_field: str | None = None

    def texts(self, *, words: bool = False) -> Inputs:
        """One text for each row, or two. ``words``: the text is divided into words."""
        second = self.second_field or getattr(self.source, "second_field", None)
        fields = (self._first_field, *([second] if second else []))
        return Inputs(self.path, fields, words, getattr(self.source, "word_column", 1))

    def single_texts(self) -> Inputs:
        """One text for each row. Raises UserError if the user names a second field."""
        if self.second_field is not None:
            raise UserError(
                f"--second-field is {self.second_field}, but one text of each row is read; leave "
                "it out"
            )
        return Inputs(self.path, (self._first_field,))

    @property
    def _first_field(self) -> str:
        found = (getattr(self.source, name, None) for name in ("source_field", "text_field"))
        return self.text_field or next(filter(None, found), "text")

    def choices(self) -> Inputs:
        """A text and several to choose from; the answer is read if the user names its field."""
        found = self.source if isinstance(self.source, ChoiceSource) else ChoiceSource()
        choices = replace(
            found,
            text_field=self.text_field or found.text_field,
            question_field=self.second_field or found.question_field,
            choice_fields=self.choice_fields or found.choice_fields,
            label_field=self.label_field or found.label_field,
        )
        answers = self.label_field is not None
        return Inputs(self.path, choices.fields, choices=choices, answers=answers)


@dataclass(frozen=True)
class Predicted:
    """What a model of ``config`` found for each of the examples; ``texts``: None of images."""

    config: TransformerConfig
    examples: Any
    found: Sequence[Arrays]
    texts: TextRows | None = None

    @property
    def rows(self) -> Sequence[InputRow]:
        """The rows that the examples are of."""
        return () if self.texts is None else self.texts.rows

    @property
    def names(self) -> tuple[str, ...]:
        """The model's labels, named as transformers does where they have no names."""
        config = self.config
        return config.label_names or tuple(f"LABEL_{n}" for n in range(config.num_labels))


@dataclass(frozen=True)
class Head:
    """What is read for a head, and written of its predictions."""

    objective: Any
    """Its ``prepare`` and ``predict`` give the predictions."""

    @classmethod
    def of_model(cls, objective: Any, config: TextConfig, framing: str) -> Self:
        """The head of a model that was not trained here; ``objective``: the type."""
        return cls(objective(framing=framing))

    def inputs(self, file: RowFile) -> Inputs | AnsweredRows:
        """How the rows of a file are read."""
        return file.texts()

    def length(self, positions: int, trained: int | None) -> int:
        """Maximum number of tokens of an example. ``positions``: what the model takes;
        ``trained``: the length of the run's sequences, None of a model of no run."""
        return min(positions, trained or positions)

    def fitted(self, rows: Sequence[InputRow], length: int) -> Self:
        """The head for these rows, with examples of at most ``length`` tokens."""
        return self

    def examples(self, texts: TextRows, length: int) -> Examples:
        """The rows as examples. Raises UserError for rows that the model does not take."""
        return labelled_examples(texts, self.objective.window_spec(length))

    def model(self, model: Any) -> Any:
        """The part of a model that ``objective`` is computed with, with the same parameters."""
        return model

    def lines(self, predicted: Predicted) -> list[Line]:
        """A JSON object for each row."""
        raise NotImplementedError


@dataclass(frozen=True)
class Labels(Head):
    """The likeliest label of a text, of a pair, or of an image, with the probabilities of all."""

    problem: ProblemType | None = None
    """What the labels of a model are: by default one, which a run here learns."""

    @classmethod
    def of_model(cls, objective: Any, config: TextConfig, framing: str) -> Self:
        loss = "mse" if config.num_labels == 1 else "cross_entropy"
        return cls(objective(framing=framing, loss=loss), config.problem_type)

    def lines(self, predicted: Predicted) -> list[Line]:
        if self.objective.loss == "mse":
            return [{"value": six_digits(row["predicted"][0])} for row in predicted.found]
        # Of several labels, all whose probability is above one half hold. One label can have the
        # loss of sigmoids too.
        several = self.problem == "multi_label_classification"
        independent = several or self.objective.loss == "sigmoid"
        lines: list[Line] = []
        names = predicted.names
        for row in predicted.found:
            logits = row["logits"][0].astype(np.float64)
            if self.problem == "regression":
                numbers = zip(names, map(six_digits, logits), strict=True)
                lines.append({"values": dict(numbers)})
                continue
            shares = expit(logits) if independent else softmax(logits)
            best = int(logits.argmax())
            line: Line = {"label": names[best], "probability": six_digits(shares[best])}
            if several:
                line = {"labels": [name for name, p in zip(names, shares, strict=True) if p >= 0.5]}
            probabilities = zip(names, map(six_digits, shares), strict=True)
            lines.append(line | {"probabilities": dict(probabilities)})
        return lines


class Rewards(Head):
    """The number that a reward model gives to an answered conversation."""

    def inputs(self, file: RowFile) -> AnsweredRows:
        file.single_texts()  # there is no second field
        return AnsweredRows(file.path, file.text_field)

    def length(self, positions: int, trained: int | None) -> int:
        return positions

    def fitted(self, rows: Sequence[InputRow], length: int) -> Self:
        return replace(self, objective=AnswerRewards())  # the run's compares several answers

    def examples(self, texts: TextRows, length: int) -> Examples:
        return answered_examples(texts, length)

    def lines(self, predicted: Predicted) -> list[Line]:
        return [{"value": six_digits(row["predicted"][0, 0])} for row in predicted.found]


class Tags(Head):
    """The tag of each word."""

    def inputs(self, file: RowFile) -> Inputs:
        return file.texts(words=True)

    def lines(self, predicted: Predicted) -> list[Line]:
        tagged, names = tagged_words(predicted.found, predicted.examples), predicted.names
        return [
            {
                "words": [
                    {"word": word, "start": start, "end": end, "tag": names[tag]}
                    for (word, start, end), tag in zip(row.words, tagged[number][0], strict=True)
                ]
            }
            for number, row in enumerate(predicted.rows)
        ]


class Answers(Head):
    """The answer to a question in a text."""

    def inputs(self, file: RowFile) -> Inputs:
        fields = (file.text_field or "question", file.second_field or "context")
        return Inputs(file.path, fields, questions=True)

    def length(self, positions: int, trained: int | None) -> int:
        return min(positions, trained or _WINDOW_LENGTH)

    def fitted(self, rows: Sequence[InputRow], length: int) -> Self:
        question = self.objective.max_question_length
        if question >= length - overhead(self.objective.framing, 2):  # of a model of few positions
            question = length // 2
        return replace(self, objective=replace(self.objective, max_question_length=question))

    def lines(self, predicted: Predicted) -> list[Line]:
        assert predicted.texts is not None
        documents = [row.document for row in predicted.rows]
        answers = best_answers(
            predicted.found,
            predicted.examples,
            self.objective,
            documents.__getitem__,
            predicted.texts.tokenizer,
        )
        lines: list[Line] = []
        for number in range(len(documents)):
            (best, *_), none = answers[number]
            line: Line = {"answer": best.text, "score": six_digits(best.score)}
            line |= {"start": best.start, "end": best.end}
            lines.append(dict.fromkeys(line) | {"answer": ""} if none else line)
        return lines


class Choices(Head):
    """Which of several texts is right."""

    def inputs(self, file: RowFile) -> Inputs:
        return file.choices()

    def fitted(self, rows: Sequence[InputRow], length: int) -> Self:
        most = max(len(row.choices) for row in rows)
        return replace(self, objective=replace(self.objective, choices=most))

    def lines(self, predicted: Predicted) -> list[Line]:
        lines = []
        for row, one in zip(predicted.rows, predicted.found, strict=True):
            logits = one["logits"][0, : len(row.choices)].astype(np.float64)
            shares, best = list(map(six_digits, softmax(logits))), int(logits.argmax())
            line: Line = {"choice": best, "text": row.choices[best], "probability": shares[best]}
            lines.append(line | {"probabilities": shares})
        return lines


class Embeddings(Head):
    """The vector of a text (``--pool``)."""

    def inputs(self, file: RowFile) -> Inputs:
        return file.single_texts()

    def length(self, positions: int, trained: int | None) -> int:
        return positions

    def examples(self, texts: TextRows, length: int) -> Examples:
        frame = self.objective.frame
        if length <= (special := len(frame.before) + len(frame.after)):
            raise UserError(
                f"texts have at most {length} tokens, {special} of them special ones, which leaves "
                "none; raise max_seq_length in the folder's sentence_bert_config.json, "
                "or choose a model of longer texts"
            )
        return text_examples(texts)

    def lines(self, predicted: Predicted) -> list[Line]:
        return [
            {"embedding": list(map(six_digits, row["embedding"][0]))} for row in predicted.found
        ]


class ImageEmbeddings(Embeddings):
    """The vector of an image."""

    def model(self, model: Any) -> Any:
        return encoder_of(model)


class TextScores(Embeddings):
    """The log-likelihood of a text (``--score``)."""

    def examples(self, texts: TextRows, length: int) -> Examples:
        examples = text_examples(texts)
        check_lengths(examples.ids, self.objective.capacity(length))
        return examples

    def lines(self, predicted: Predicted) -> list[Line]:
        """Those of `score_lines`, and the bits for each byte of the scored tokens."""
        rows, texts = len(predicted.rows), predicted.texts
        lines = score_lines(rows, np.arange(rows), predicted.found)
        assert texts is not None
        for line, row in zip(lines, predicted.rows, strict=True):
            text = str(row.document.text[0])
            size: float = len(text.encode())
            if not self.objective.frame.before:  # nothing from which to predict the first token
                size -= bytes_of_first(text, texts.tokenizer)
            bits = -line["log_likelihood"] / math.log(2)
            line["bits_per_byte"] = six_digits(bits / size) if line["tokens"] and size else None
        return lines


class MaskedTextScores(TextScores):
    """The pseudo-log-likelihood of a text, whose tokens are masked one at a time."""

    def examples(self, texts: TextRows, length: int) -> Examples:
        return MaskedTokens.of_texts(super().examples(texts, length))

    def lines(self, predicted: Predicted) -> list[Line]:
        rows = len(predicted.rows)
        return score_lines(rows, predicted.examples.text, predicted.found, "pseudo_")


class ChoiceScores(Embeddings):
    """The log-likelihood of each choice after its context (``--score --choices-field``)."""

    def inputs(self, file: RowFile) -> Inputs:
        return file.choices()

    def examples(self, texts: TextRows, length: int) -> Examples:
        before = (noted_frame(texts.tokenizer) or Frame()).before
        requests = continuations.choice_requests(texts.rows, texts.tokenizer, before)
        continuations.check_requests(requests, length, "choice")
        ids = {token for one in requests for token in (*one.context, *one.continuation)}
        require_known(texts.tokenizer, ids, texts.config.vocab_size, "input")
        return continuations.Requests(requests)

    def lines(self, predicted: Predicted) -> list[Line]:
        lines = continuations.choice_lines(predicted.rows, predicted.found)
        for name, score in continuations.accuracies(lines).items():
            log.info("%s %.4f of %d rows", name.replace("_", " "), score, len(lines))
        return lines


HEADS: dict[Any, type[Head]] = {
    QuestionAnswering: Answers,
    TokenClassification: Tags,
    MultipleChoice: Choices,
    SequenceClassification: Labels,
    ImageClassification: Labels,
    RewardModel: Rewards,
}


def head_of(objective: Any) -> Head | None:
    """The head that an objective trains, by the entry of its type in `HEADS`, or of its nearest
    base class; None for others."""
    kind = next((HEADS[kind] for kind in type(objective).__mro__ if kind in HEADS), None)
    return None if kind is None else kind(objective)


def head_of_model(config: TextConfig, place: str, framing: str | None = None) -> Head:
    """The head of a model of text that was not trained here, read from ``place``. ``framing``: the
    special tokens around its texts, by default those of its family.

    Raises UserError if it has no head for labels, tags, answers or choices.
    """
    model: Any = build_model(config)
    for objective, kind in HEADS.items():
        needs = objective.needs
        if set(needs.inputs) <= set(model.inputs) and all(hasattr(model, h) for h in needs.heads):
            return kind.of_model(objective, config, framing or config.framing)
    writes = hasattr(model, "unembed") and config.causal
    hint = "use flax-transformers generate" if writes else "use --pool for embeddings"
    raise UserError(
        f"{place} holds a {config.architecture}, which has no head for labels, tags, answers or "
        f"translations; {hint}, or give a fine-tuned model"
    )


def embedding_head(
    config: TextConfig, tokenizer: Tokenizer, pool: Literal["mean", "cls"], normalize: bool
) -> Embeddings:
    """What ``--pool`` computes with a model of text; ``normalize``: vectors of length 1."""
    model: Any = build_model(config)
    encodes = "decoder_input_ids" in model.inputs
    return Embeddings(TextEmbedding(_frame_of(tokenizer), pool, normalize, encodes))


def score_head(config: TextConfig, tokenizer: Tokenizer, place: str, choices: bool) -> Head:
    """What ``--score`` computes with a model, of texts or of ``choices``.

    Raises UserError for a masked model whose tokenizer has no mask."""
    if choices:
        both_ways = bool(config.generation.bidirectional_prompt)
        return ChoiceScores(continuations.ContinuationLikelihood(both_ways))
    if config.causal:
        return TextScores(Likelihood(noted_frame(tokenizer) or Frame()))
    if tokenizer.vocabulary.mask_id is None:
        raise UserError(f"the tokenizer of {place} has no mask token; --score needs one")
    return MaskedTextScores(PseudoLikelihood(_frame_of(tokenizer)))


def _frame_of(tokenizer: Tokenizer) -> Frame:
    """The special tokens around a text; [CLS] and [SEP] if neither run nor tokenizer names any."""
    return noted_frame(tokenizer) or bert_frame(tokenizer.vocabulary)
