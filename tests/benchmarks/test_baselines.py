"""The baselines of ``benchmarks/baselines``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.baselines.questions import window_overlap
from benchmarks.baselines.tagging import tagging_baselines
from benchmarks.baselines.text import grams, ngram_cross_entropy, text_baselines
from benchmarks.baselines.translation import translation_baselines, word_lookup
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.evaluation.tasks import baselines
from flax_transformers.evaluation.translation import pairs_of
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.testing import tiny_config, write_corpus
from tests.evaluation import test_translation

VOCABULARY = Vocabulary(size=12, pad_id=0, sentinel_ids=(9, 8, 7))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text of fourteen words, in bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text.txt", 80)
    data = TextData(
        source=TextSource(str(folder / "text.txt")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.2,
        shards=1,
    )
    return prepare(dataclasses.replace(data, prepare_processes=1), folder / "bytes")


def test_ngrams_mix_orders_as_witten_and_bell_do():
    train = np.array([[-1, 0], [0, 1], [1, 0], [0, 0]])
    held_out = np.array([[0, 1], [2, 1]])
    # Four tokens of two kinds: 3 of id 0, 1 of id 1; of three ids in all.
    unigram = (1 + 2 / 3) / (4 + 2)
    bigram = (1 + 2 * unigram) / (2 + 2)  # 0 was seen twice, and two kinds came after it
    expected = -np.log([bigram, unigram]).mean()
    assert ngram_cross_entropy(train, held_out, 3) == pytest.approx(expected, rel=1e-12)


def test_an_ngram_guess_is_a_distribution():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4, (60, 3))
    every = np.array([[2, 3, last] for last in range(4)])
    shares = [np.exp(-ngram_cross_entropy(train, row[None], 4)) for row in every]
    assert sum(shares) == pytest.approx(1.0, rel=1e-12)


def test_contexts_end_where_a_document_begins_and_weightless_labels_are_only_context():
    batch = {
        "input_ids": np.zeros((1, 6), np.int32),
        "labels": np.array([[3, 4, 5, 6, 5, 0]], np.int32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]], np.int32),
        "label_weights": np.array([[0, 1, 1, 1, 1, 0]], np.float32),
    }
    expected = [[-1, 3, 4], [3, 4, 5], [-1, -1, 6], [-1, 6, 5]]
    assert grams(batch, VOCABULARY, 3).tolist() == expected


def test_a_damaged_text_has_a_copying_baseline(text):
    def scores(objective):
        config = tiny_config("text.txt", "store", objective=objective)
        trigram, copying = text_baselines(config, text)
        assert (copying.name, copying.counted) == ("copying cross-entropy", trigram.counted)
        return trigram.score, copying.score

    _, undamaged = scores(Denoising(infill_share=0.0, permute_sentences=False))
    assert undamaged < 0.01
    trigram, damaged = scores(Denoising())
    assert 0.1 < damaged < 0.8 * trigram
    trigram, deleted = scores(Denoising(delete_share=0.3))
    assert damaged < deleted < trigram


@pytest.mark.parametrize("objective", [CausalLM(), SpanCorruption(mean_span=8.0)])
def test_a_trigram_is_better_than_the_unigram_on_the_same_labels(text, objective):
    config = tiny_config("text.txt", "store", objective=objective)
    (trigram,), (unigram,) = text_baselines(config, text), baselines(config, text)
    assert (trigram.name, unigram.name) == ("trigram cross-entropy", "unigram cross-entropy")
    assert trigram.counted == unigram.counted and 0.5 < trigram.score < unigram.score


dictionary_pairs = test_translation.prepared  # a fixture


def test_a_word_lookup_finds_the_translation_of_each_word():
    pairs = [("a b", "x y"), ("a c", "x z"), ("b c", "y z"), ("a", "x")]
    assert word_lookup((one.split(), other.split()) for one, other in pairs) == {
        "a": "x",
        "b": "y",
        "c": "z",
    }


def test_translation_baselines_are_scored_on_the_held_out_pairs(dictionary_pairs):
    found = {baseline.key: baseline for baseline in translation_baselines(*dictionary_pairs)}
    held_out = len(pairs_of(*dictionary_pairs, "validation", 1000))
    assert set(found) == {
        "copying_bleu", "copying_chrf", "word_lookup_bleu", "word_lookup_chrf"
    }  # fmt: skip
    assert {baseline.counted for baseline in found.values()} == {f"{held_out} held-out pairs"}
    assert found["word_lookup_bleu"].score == pytest.approx(100.0)
    assert found["copying_bleu"].score < 1.0


def test_a_word_has_its_most_frequent_tag_at_any_position_of_a_sentence(tmp_path):
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
    prepared = prepare(data, tmp_path / "store")
    config = tiny_config("text.txt", "store", objective=TokenClassification())
    (found,) = tagging_baselines(config, prepared)
    # "Run" began a sentence in training, and "far" did not; "new" gets the most frequent tag, "A".
    assert (found.score, found.counted) == (2 / 3, "3 held-out words")


def test_the_answer_is_taken_from_the_window_with_most_words_of_the_question():
    context = "Rain fell. The cafe opened in 1870 near the Warsaw river. It is far from here."
    assert window_overlap("When was the cafe near Warsaw opened?", context, 6) == "in 1870"
    assert window_overlap("?", "...") == "..."
