"""Entities of tags, as conlleval and seqeval count them."""

from __future__ import annotations

import pytest

from flax_transformers.evaluation.tagging import entities, entity_scores, is_iob2


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-PER I-PER O", [("PER", 0, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("O I-LOC B-LOC I-LOC", [("LOC", 1, 2), ("LOC", 2, 4)]),
    ],
)
def test_entities_begin_and_end_as_in_conlleval(tags, expected):
    assert entities(tags.split()) == expected


def test_an_entity_is_right_only_as_a_whole():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG"], ["O"]]
    guessed = [["B-PER", "O", "O", "B-LOC"], ["B-PER"], ["B-LOC"]]
    found = entity_scores(guessed, true)
    assert found == {"f1": 2 / 7, "precision": 1 / 4, "recall": 1 / 3}
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_only_iob2_tags_have_entities():
    assert is_iob2(("B-LOC", "I-LOC", "O"))
    assert not is_iob2(("NOUN", "VERB", "O")) and not is_iob2(("B-LOC",))
