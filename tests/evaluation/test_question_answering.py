"""Answers: the best spans, and SQuAD's scores."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.data.sources.squad import Question
from flax_transformers.evaluation.question_answering import (
    answer_scores,
    best_answers,
    best_spans,
    exact_match,
    normalized,
    overlap_f1,
)
from flax_transformers.objectives.question_answering import QuestionAnswering


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


CONTEXT = "In 1870 the old theatre opened ."
NOTHING = "\u200b"


class Words:
    """A tokenizer whose tokens are words, of which ``NOTHING`` has none."""

    def encode_with_offsets(self, texts):
        offsets = []
        for text in texts:
            if text == NOTHING:
                offsets.append(np.zeros((0, 2), np.int32))
                continue
            ends = np.cumsum([len(word) + 1 for word in text.split(" ")]) - 1
            offsets.append(np.stack([np.append(0, ends[:-1] + 1), ends], axis=1))
        return [(np.zeros(len(rows), int), rows) for rows in offsets]


def window(offset, nothing, **logits):
    """What the model says of four words of ``CONTEXT``, from word ``offset`` on, behind a question
    of one token: the logits of words as first and as last ones, and of no answer."""
    row = np.full((8, 2), -9.0, np.float32)
    row[0] = nothing / 2
    for number, word in enumerate(CONTEXT.split()[offset : offset + 4]):
        row[3 + number] = logits.get(word, row[3 + number])
    return {
        "logits": row, "context_start": 3, "context_end": 7, "context_offset": offset,
    }  # fmt: skip


def answers_of(*windows, context=CONTEXT, **settings):
    """The answers to a question with these windows, and whether to give none."""
    rows = [window | {"example_id": 5 + number} for number, window in enumerate(windows)]
    batches = [{name: np.stack([row[name]]) for name in row} for row in rows]
    found = best_answers(
        batches,
        SimpleNamespace(document_of=lambda number: 2),
        QuestionAnswering(**settings),
        lambda document: Question(("what?", context)),
        Words(),
    )
    assert list(found) == [2]
    return found[2]


def test_the_answer_is_the_best_span_of_all_windows():
    first = window(0, 0.0, the=(1.0, 0.0), old=(-1.0, 2.0))
    second = window(3, 0.0, old=(2.0, -1.0), theatre=(-1.0, 3.0))
    for windows in ((first, second), (second, first)):
        best, none = answers_of(*windows, best=2)
        assert [(one.text, one.score) for one in best] == [("old theatre", 5.0), ("the old", 3.0)]
        assert [CONTEXT[one.start : one.end] for one in best] == [one.text for one in best]
        assert not none
    best, _ = answers_of(first, second, best=1, max_answer_length=1)
    assert [(one.text, one.score) for one in best] == [("theatre", 2.0)]


def test_a_text_without_tokens_has_an_empty_answer():
    unknown = window(0, 0.0) | {"context_end": 4}
    (answer,), none = answers_of(unknown, context=NOTHING)
    assert (answer.text, answer.score, answer.start, answer.end) == ("", -18.0, 0, 0) and not none


def test_no_answer_is_given_if_every_window_prefers_none_by_more_than_the_threshold():
    windows = (
        window(0, 9.0, the=(1.0, 0.0), old=(0.0, 1.0)),
        window(3, 3.5, old=(1.0, 0.0), theatre=(0.0, 2.0)),
    )  # 3.5 against 3
    for order in (windows, windows[::-1]):
        assert answers_of(*order, no_answer=True)[1]
        assert not answers_of(*order)[1]
        assert answers_of(*order, no_answer=True, null_threshold=0.4)[1]
        assert not answers_of(*order, no_answer=True, null_threshold=0.6)[1]
