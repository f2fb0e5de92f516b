"""Answers: the best spans, and SQuAD's scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flax_transformers.data.sources.squad import Question
from flax_transformers.evaluation.question_answering import (
    answer_scores,
    best_spans,
    exact_match,
    normalized,
    overlap_f1,
)


@pytest.mark.parametrize(("length", "longest"), [(1, 5), (7, 3), (12, 30), (30, 1)])
def test_best_spans_are_those_of_a_search_through_all(length, longest):
    logits = np.random.default_rng(length).normal(size=(length, 2))
    spans = [
        (logits[i, 0] + logits[j, 1], i, j)
        for i, j in itertools.product(range(length), repeat=2)
        if i <= j < i + longest
    ]
    found = [(span.score, span.first, span.last) for span in best_spans(logits, 900, longest)]
    assert found == sorted(spans, reverse=True)
    assert best_spans(logits, 1, longest)[0].score == max(spans)[0]


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        ("the Cat!", "cat", 1.0, 1.0),
        ("1,870 a year", "1870 year", 1.0, 1.0),
        ("big black cat", "the cat", 0.0, 0.5),
        ("cat cat", "cat", 0.0, 2 / 3),
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "an", 1.0, 1.0),
        ("", "", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1_are_those_of_squad(answer, truth, exact, f1):
    assert (exact_match(answer, truth), overlap_f1(answer, truth)) == (exact, pytest.approx(f1))


def test_articles_and_punctuation_do_not_count():
    assert normalized("  The U.S.A., an  athlete's\n") == "usa athletes"


def test_the_best_reference_counts_and_the_empty_answer_is_right_without_references():
    context = "In 1870 the old theatre opened."
    old = (context.index("the old"), context.index("the old") + len("the old theatre"))
    theatre = (context.index("theatre"), context.index("theatre") + len("theatre"))
    several = Question(("what?", context), answers=(old, theatre))
    none = Question(("who?", context))
    assert answer_scores([("theatre", several)]) == {"exact_match": 1.0, "f1": 1.0}
    assert answer_scores([("theatre", several), ("", none), ("1870", none)]) == {
        "exact_match": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "no_answer_accuracy": 0.5,
        "has_answer_f1": 1.0,
    }
