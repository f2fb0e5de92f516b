"""A baseline of question answering: the text around the words of the question."""

from __future__ import annotations

import re

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.sources.squad import question_of_record
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.question_answering import answer_scores
from flax_transformers.training.config import TrainConfig

_WORDS = re.compile(r"\w+")
_WINDOW = 15


def question_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """Exact match and F1 of `window_overlap`."""
    held_out = prepared.validation
    assert held_out is not None
    questions = [
        question_of_record(held_out.record(number)) for number in range(held_out.num_documents)
    ]
    scores = answer_scores([(window_overlap(*one.text), one) for one in questions])
    counted = len(questions), "held-out questions"
    return [
        Baseline("window overlap", f"eval/{metric}", scores[metric], *counted)
        for metric in ("exact_match", "f1")
    ]


def window_overlap(question: str, context: str, width: int = _WINDOW) -> str:
    """An answer from the window of ``width`` words of the context that contains the most different
    words of the question.

    It reaches from the first to the last word of the window that is not in the question. Of several
    such windows the first counts.
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
