"""Answers to held-out questions: the best span over all windows, and SQuAD's scores of it.

Exact match and F1 are those of SQuAD 1.1 (arXiv:1606.05250 §6.1) and, where there may be no answer,
2.0 (arXiv:1806.03822), from 0 to 1: of each question the best over its true answers.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.sources.squad import Question, read_record
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.predictions import held_out_predictions
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.storage.workdir import write_text
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = re.compile(r"\w+")
_WINDOW = 15
"""Words that the window-overlap guess looks at."""


@dataclass(frozen=True)
class Span:
    """A stretch of a text by its first and last token, and how likely it is to be the answer."""

    score: float
    first: int
    last: int


def question_evaluator(
    config: TrainConfig, prepared: PreparedText, folder: epath.Path | None
) -> Evaluator:
    """``{"eval/exact_match", "eval/f1"}`` of held-out questions, and with ``no_answer`` the same
    of those that have one, and the accuracy of those that have none.

    The likeliest answers to each go to ``step_....json`` in the ``folder``.
    """
    objective = config.objective
    assert isinstance(objective, QuestionAnswering)
    predictions = held_out_predictions(config, prepared)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        spec = objective.window_spec(snapshot.phase.sequence_length)
        examples = prepared.examples("validation", spec)
        assert isinstance(examples, LabelledExamples)  # as the objective answers questions
        spans: dict[int, list[Span]] = defaultdict(list)
        nothing: dict[int, float] = {}
        for batch in predictions(snapshot):
            for row, number in enumerate(batch["example_id"].tolist()):
                document = examples.document_of(number)
                found, none = _of_row({name: batch[name][row] for name in batch}, objective)
                spans[document] += found
                nothing[document] = min(none, nothing.get(document, np.inf))
        questions = {one: read_record(examples.store.record(one)) for one in spans}
        offsets = _offsets(prepared, questions.values())
        answers: dict[int, str] = {}
        likeliest = {}
        for document, question in questions.items():
            best = sorted(spans[document], key=lambda span: -span.score)[: objective.best]
            texts = [_text(span, question.text[1], offsets[question.text[1]]) for span in best]
            likeliest[question.name or str(document)] = [
                {"text": text, "score": span.score} for text, span in zip(texts, best, strict=True)
            ]
            refused = nothing[document] - best[0].score > objective.null_threshold
            answers[document] = "" if objective.no_answer and refused else texts[0]
        if folder is not None and jax.process_index() == 0:
            path = folder / f"step_{snapshot.step:08d}.json"
            write_text(path, json.dumps(likeliest, ensure_ascii=False, indent=1) + "\n")
        scored = [(answers[document], questions[document]) for document in questions]
        return {f"eval/{name}": score for name, score in answer_scores(scored).items()}

    return evaluate


def _of_row(row: dict[str, np.ndarray], objective: QuestionAnswering) -> tuple[list[Span], float]:
    """The best spans of one window, in tokens of the whole text, and the score of "not here"."""
    start, end, offset = (
        int(row[name]) for name in ("context_start", "context_end", "context_offset")
    )
    logits = row["logits"].astype(np.float64)
    found = best_spans(logits[start:end], objective.best, objective.max_answer_length)
    moved = [Span(span.score, span.first + offset, span.last + offset) for span in found]
    return moved, float(logits[0].sum())


def best_spans(logits: np.ndarray, count: int, longest: int) -> list[Span]:
    """The ``count`` spans of at most ``longest`` tokens with the highest sum of both ends' logits,
    float [T, 2], the best first."""
    length = len(logits)
    ends = np.arange(length)[:, None] + np.arange(min(longest, length))[None]
    inside = ends < length
    scores = logits[:, :1] + logits[np.minimum(ends, length - 1), 1]
    flat = np.where(inside, scores, -np.inf).ravel()
    order = np.argsort(-flat, kind="stable")[: min(count, int(inside.sum()))]
    firsts, spread = np.divmod(order, ends.shape[1])
    return [
        Span(float(flat[place]), int(first), int(first + more))
        for place, first, more in zip(order, firsts, spread, strict=True)
    ]


def _offsets(prepared: PreparedText, questions: Iterable[Question]) -> dict[str, np.ndarray]:
    """Where the tokens of each text begin and end; many questions are about the same."""
    contexts = list(dict.fromkeys(question.text[1] for question in questions))
    encoded = prepared.tokenizer.encode_with_offsets(contexts)
    return {context: offsets for context, (_, offsets) in zip(contexts, encoded, strict=True)}


def _text(span: Span, context: str, offsets: np.ndarray) -> str:
    return context[offsets[span.first, 0] : offsets[span.last, 1]].strip()


def answer_scores(answered: Sequence[tuple[str, Question]]) -> dict[str, float]:
    """Means over questions; a question without true answers is answered right by ""."""
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
    # As in SQuAD 2.0's script, what is nothing but articles and punctuation is no true answer.
    true = [text for text in true if normalized(text)] or [""]
    return max(score(answer, text) for text in true)


def normalized(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles, and blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 where both are the same but for what `normalized` takes away."""
    return float(normalized(answer) == normalized(truth))


def overlap_f1(answer: str, truth: str) -> float:
    """F1 of the words of an answer, how often each stands there included."""
    ours, theirs = normalized(answer).split(), normalized(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def question_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """What the stretch of the text scores that has most words of the question around it."""
    held_out = prepared.validation
    if not isinstance(config.objective, QuestionAnswering) or held_out is None:
        return []
    if held_out.label_kind != "spans":  # refused when the run begins
        return []
    if config.evaluation.max_examples is not None:  # the model is scored on a part of these
        return []
    questions = [read_record(held_out.record(number)) for number in range(held_out.num_documents)]
    scores = answer_scores([(window_overlap(*one.text), one) for one in questions])
    counted = len(questions), "held-out questions"
    return [
        Baseline("window overlap", f"eval/{metric}", scores[metric], *counted)
        for metric in ("exact_match", "f1")
    ]


def window_overlap(question: str, context: str, width: int = _WINDOW) -> str:
    """The words of the text's window with most different words of the question that are not in
    the question themselves, from the first such word to the last.

    The window is ``width`` words wide; of equally good ones it is the first.
    """
    asked = {word.lower() for word in _WORDS.findall(question)}
    words = [(match[0].lower(), *match.span()) for match in _WORDS.finditer(context)]
    if not words:
        return context.strip()
    starts = range(max(1, len(words) - width + 1))
    best = max(starts, key=lambda i: len(asked.intersection(w for w, _, _ in words[i : i + width])))
    window = words[best : best + width]
    new = [(start, end) for word, start, end in window if word not in asked]
    return context[new[0][0] : new[-1][1]] if new else context[window[0][1] : window[-1][2]]
