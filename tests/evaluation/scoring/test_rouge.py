"""ROUGE, with the figures of rouge-score 0.1.2."""

from __future__ import annotations

import pytest

from flax_transformers.evaluation.scoring.rouge import common_subsequence, rouge_scores

GUESSES = [
    "The cat sat on the mat.",
    "Two dogs, one bone: who gets it?",
    "nothing in common",
]
REFERENCES = [
    "A cat was sitting on the mat!",
    "One bone for two dogs",
    "entirely different words here",
]


def test_scores_are_those_of_the_reference_scorer():
    assert rouge_scores(GUESSES, REFERENCES) == pytest.approx(
        {"rouge1": 42.735042735042725, "rouge2": 25.454545454545453, "rougeL": 31.62393162393162}
    )


def test_repeated_words_count_as_often_as_in_both():
    assert rouge_scores(["a a a b"], ["a a c"])["rouge1"] == pytest.approx(100 * 4 / 7)


def test_texts_without_words_score_nothing():
    assert rouge_scores(["...", "猫"], ["...", "猫"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_a_common_subsequence_keeps_the_order():
    assert common_subsequence("abcbdab", "bdcaba") == 4
    assert common_subsequence("ab", "ba") == 1
    assert common_subsequence("", "a") == 0
