"""Entities of tags, as conlleval and seqeval count them."""

from __future__ import annotations

import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.prepare.text import prepare_text
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.evaluation.tagging import (
    entities,
    entity_scores,
    is_iob2,
    tagging_baselines,
)
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.testing import tiny_config


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


def test_a_word_is_guessed_alike_wherever_it_stands_in_a_sentence(tmp_path):
    def source(name, *sentences):
        lines = [
            "".join(f"{i}\t{word}\t{tag}\n" for i, (word, tag) in enumerate(sentence))
            for sentence in sentences
        ]
        (tmp_path / name).write_text("\n".join(lines))
        return TaggedSource(str(tmp_path / name), word_column=1, tag_column=2)

    data = TextData(
        source=source("train.tsv", [("Run", "V"), ("far", "A"), ("far", "A")]),
        validation_source=source("test.tsv", [("far", "A"), ("Run", "V"), ("new", "V")]),
        tokenizer=TokenizerConfig("bytes"),
        shards=1,
    )
    prepared = prepare_text(data, tmp_path / "store")
    config = tiny_config("text.txt", "store", objective=TokenClassification())
    (found,) = tagging_baselines(config, prepared)
    # "Run" began a sentence in training, and "far" did not; "new" gets the most frequent tag, "A".
    assert (found.score, found.counted) == (2 / 3, "3 held-out words")
