"""Scores of extractive question answering: the best span over all windows of a text.

Exact match and F1 in [0, 1] follow SQuAD 1.1 (arXiv:1606.05250 §6.1) and, where a question may have
no answer, 2.0 (arXiv:1806.03822). A question scores the maximum over its reference answers.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.sources.documents import Document
from flax_transformers.data.sources.squad import Question, question_of_record
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.held_out import Reader
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.storage.workdir import write_side_file
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Span:
    """First and last token of a candidate answer, and the sum of its logits."""

    score: float
    first: int
    last: int


def question_reader(
    config: TrainConfig, prepared: PreparedText, folder: epath.Path | None
) -> Reader:
    """A reader of predictions: ``{"eval/exact_match", "eval/f1"}`` of held-out questions, and the
    scores of `answer_scores` if some of them have no answer.

    The best answers to each question are written to ``step_....json`` in ``folder``.
    """
    objective = config.objective
    assert isinstance(objective, QuestionAnswering)

    def read(snapshot: Snapshot, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, float]:
        spec = objective.window_spec(snapshot.phase.sequence_length)
        examples = prepared.examples("validation", spec)
        assert isinstance(examples, LabelledExamples)
        store = examples.store
        questions = functools.cache(lambda document: question_of_record(store.record(document)))
        answered = best_answers(batches, examples, objective, questions, prepared.tokenizer)
        best_answers_by_id = {
            questions(document).name or str(document): [
                {"text": one.text, "score": one.score} for one in best
            ]
            for document, (best, _) in answered.items()
        }
        if folder is not None and jax.process_index() == 0:
            path = folder / f"step_{snapshot.step:08d}.json"
            write_side_file(
                path, json.dumps(best_answers_by_id, ensure_ascii=False, indent=1) + "\n"
            )
        scored = [
            ("" if none else best[0].text, questions(document))
            for document, (best, none) in answered.items()
        ]
        return {f"eval/{name}": score for name, score in answer_scores(scored).items()}

    return read


@dataclass(frozen=True)
class Answer:
    """A span of a context: its text, the sum of its logits, and its start and end in characters."""

    text: str
    score: float
    start: int
    end: int


def best_answers(
    batches: Iterable[dict[str, np.ndarray]],
    examples: LabelledExamples,
    objective: QuestionAnswering,
    questions: Callable[[int], Document],
    tokenizer: Tokenizer,
) -> dict[int, tuple[list[Answer], bool]]:
    """The best answers to each question by its number, best first, and whether to give none.

    ``batches``: the objective's predictions for the windows ``examples`` of the ``questions``.
    """
    spans: dict[int, list[Span]] = defaultdict(list)
    nothing: dict[int, float] = {}
    for batch in batches:
        for row, number in enumerate(batch["example_id"].tolist()):
            document = examples.document_of(number)
            found, none = _of_row({name: batch[name][row] for name in batch}, objective)
            spans[document] += found
            nothing[document] = min(none, nothing.get(document, np.inf))
    context_of = {document: questions(document).text[1] for document in spans}
    contexts = list(dict.fromkeys(context_of.values()))
    encoded = tokenizer.encode_with_offsets(contexts)
    offsets = {text: of_text for text, (_, of_text) in zip(contexts, encoded, strict=True)}
    answers = {}
    for document, every in spans.items():
        context = context_of[document]
        best = sorted(every, key=lambda span: -span.score)[: objective.best]
        refused = nothing[document] - best[0].score > objective.null_threshold
        found_here = [_answer(span, context, offsets[context]) for span in best]
        answers[document] = found_here, objective.no_answer and refused
    return answers


def _answer(span: Span, context: str, offsets: np.ndarray) -> Answer:
    if not len(offsets):  # the tokenizer keeps nothing, and the unknown token stands for the text
        return Answer("", span.score, 0, 0)
    start, end = int(offsets[span.first, 0]), int(offsets[span.last, 1])
    text = context[start:end].strip()
    start += len(context[start:end]) - len(context[start:end].lstrip())
    return Answer(text, span.score, start, start + len(text))


def _of_row(row: dict[str, np.ndarray], objective: QuestionAnswering) -> tuple[list[Span], float]:
    """The best spans of one window, in tokens of the whole text, and the no-answer score."""
    start, end, offset = (
        int(row[name]) for name in ("context_start", "context_end", "context_offset")
    )
    logits = row["logits"].astype(np.float64)
    found = best_spans(logits[start:end], objective.best, objective.max_answer_length)
    moved = [Span(span.score, span.first + offset, span.last + offset) for span in found]
    return moved, float(logits[0].sum())


def best_spans(logits: np.ndarray, count: int, longest: int) -> list[Span]:
    """The ``count`` spans of at most ``longest`` tokens with the highest sum of start and end
    ``logits``, float [T, 2], best first."""
    length = len(logits)
    ends = np.arange(length)[:, None] + np.arange(min(longest, length))[None]
    inside = ends < length
    scores = logits[:, :1] + logits[np.minimum(ends, length - 1), 1]
    flat = np.where(inside, scores, -np.inf).ravel()
    order = np.argsort(-flat, kind="stable")[: min(count, int(inside.sum()))]
    firsts, spread = np.divmod(order, ends.shape[1])
    return [
        Span(float(flat[index]), int(first), int(first + more))
        for index, first, more in zip(order, firsts, spread, strict=True)
    ]


def answer_scores(answered: Sequence[tuple[str, Question]]) -> dict[str, float]:
    """Mean exact match and F1. For a question without reference answers, "" is correct; their
    accuracy, and the F1 of the others, are reported apart."""
    scores = [
        (_best(exact_match, answer, question), _best(overlap_f1, answer, question))
        for answer, question in answered
    ]
    if not scores:
        return {}
    exact, f1 = np.array(scores).T
    found = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    has_answer = np.array([bool(question.answers) for _, question in answered])
    if not has_answer.all():
        found["no_answer_accuracy"] = float(exact[~has_answer].mean())
        if has_answer.any():
            found["has_answer_f1"] = float(f1[has_answer].mean())
    return found


def _best(score: Callable[[str, str], float], answer: str, question: Question) -> float:
    context = question.text[1]
    true = [context[start:end] for start, end in question.answers]
    # As in SQuAD 2.0's script, a reference of articles and punctuation alone does not count.
    true = [text for text in true if normalized(text)] or [""]
    return max(score(answer, text) for text in true)


def normalized(text: str) -> str:
    """An answer in SQuAD's normal form: lower case, no punctuation, articles or extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 if both are equal after `normalized`, else 0."""
    return float(normalized(answer) == normalized(truth))


def overlap_f1(answer: str, truth: str) -> float:
    """F1 of the bags of words of both texts after `normalized`."""
    ours, theirs = normalized(answer).split(), normalized(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def question_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The scores of never giving an answer, for objectives that may do so."""
    held_out = prepared.validation
    assert held_out is not None and isinstance(config.objective, QuestionAnswering)
    if held_out.label_kind != "spans":  # refused when the run begins
        return []
    if not config.objective.no_answer or config.evaluation.max_examples is not None:
        return []
    questions = [
        question_of_record(held_out.record(number)) for number in range(held_out.num_documents)
    ]
    scores = answer_scores([("", question) for question in questions])
    counted = len(questions), "held-out questions"
    return [
        Baseline("no answer", f"eval/{metric}", scores[metric], *counted)
        for metric in ("exact_match", "f1")
    ]
