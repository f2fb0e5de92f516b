"""Baselines, scored on the labels that the model is scored on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.evaluation.baselines import (
    Baseline,
    of_all_parts,
    sentinels_in_turn,
)
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.evaluation.tasks import baselines
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.testing import tiny_config, write_corpus

VOCABULARY = Vocabulary(size=12, pad_id=0, sentinel_ids=(9, 8, 7))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Text of fourteen words: (bytes, sentence pieces)."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text.txt", 80)
    data = TextData(
        source=TextSource(str(folder / "text.txt")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.2,
        shards=1,
    )
    pieces = TokenizerConfig("unigram", vocab_size=330, sentinels=12)
    return (
        prepare(dataclasses.replace(data, prepare_processes=1), folder / "bytes"),
        prepare(
            dataclasses.replace(data, tokenizer=pieces, prepare_processes=1), folder / "pieces"
        ),
    )


def found(prepared, objective):
    config = tiny_config("text.txt", "store", objective=objective)
    return config, baselines(config, prepared)


def test_sentinels_in_order_count_as_one_entry():
    labels = np.array([9, 3, 8, 4, 7, 5, 1])
    assert sentinels_in_turn(labels, VOCABULARY).tolist() == [9, 3, 9, 4, 9, 5, 1]


def test_a_sentinel_out_of_order_is_an_entry_of_its_own():
    assert sentinels_in_turn(np.array([9, 3, 7, 4]), VOCABULARY).tolist() == [9, 3, 7, 4]


@pytest.mark.parametrize(
    ("objective", "kind"),
    [(MaskedLM(), 1), (CausalLM(), 1), (CausalLM(), 0), (SpanCorruption(), 1)],
)
def test_the_unigram_is_scored_on_the_labels_that_have_a_weight(prepared, objective, kind):
    config, (baseline,) = found(prepared[kind], objective)
    weights = {"MaskedLM": "masked_weights", "CausalLM": "label_weights"}
    key = weights.get(type(objective).__name__, "weights")
    labels = sum(int(batch[key].sum()) for batch in held_out_batches(config, prepared[kind], 32))
    assert baseline.name == "unigram cross-entropy"
    masked = "masked " if isinstance(objective, MaskedLM) else ""
    assert baseline.counted == f"{labels:,} {masked}held-out tokens"
    # The corpus has fourteen words, so that the unigram is far better than the uniform guess.
    assert 0.5 < baseline.score < 0.8 * np.log(prepared[kind].vocabulary.size)


def test_the_unigram_is_fitted_on_the_training_text(prepared):
    config, (baseline,) = found(prepared[1], MaskedLM())
    counts = prepared[1].train.unigram_counts + 1
    labels = np.concatenate(
        [
            batch["masked_labels"][batch["masked_weights"] > 0]
            for batch in held_out_batches(config, prepared[1], 32)
        ]
    )
    expected = -np.log(counts / counts.sum())[labels].mean()
    assert baseline.score == pytest.approx(expected, rel=1e-12)


def test_the_baseline_of_next_sentences_is_one_half(prepared):
    config, (_, chance) = found(prepared[1], NextSentence())
    pairs = sum(
        batch["next_sentence_weights"].sum() for batch in held_out_batches(config, prepared[1], 32)
    )
    assert (chance.metric, chance.score) == ("eval/next_sentence_accuracy", 0.5)
    assert chance.counted == f"{int(pairs):,} held-out pairs"


def test_the_baseline_of_a_mixture_is_the_mean_of_its_components():
    loss = Baseline("unigram cross-entropy", "eval/loss", 4.0, 300, "held-out tokens")
    bleu = Baseline("copying", "eval/bleu", 2.0, 10, "held-out pairs")
    parts = [
        loss.of_part("de"),
        bleu.of_part("de"),
        dataclasses.replace(loss, score=2.0, count=100).of_part("en"),
    ]
    assert of_all_parts(parts) == [dataclasses.replace(loss, score=3.5, count=400)]
    assert parts[0].metric == "eval/loss_de" and parts[0].is_loss
    assert parts[0].key == "unigram_cross_entropy_de"
    assert parts[0].line() == "loss 4.000 nats on 300 held-out tokens of de (unigram cross-entropy)"
    assert parts[1].verdict(3.0) == (
        "held-out BLEU 3.0, copying 2.0: 1.0 better on 10 held-out pairs of de"
    )


def test_a_verdict_says_by_how_much_the_model_is_better_or_worse():
    loss = Baseline("unigram cross-entropy", "eval/loss", 5.968, 3566, "held-out tokens")
    assert loss.line() == "loss 5.968 nats on 3,566 held-out tokens (unigram cross-entropy)"
    assert loss.verdict(5.241) == (
        "held-out loss 5.241 nats, unigram cross-entropy 5.968 nats: 0.727 nats better on 3,566 "
        "held-out tokens"
    )
    bleu = Baseline("word lookup", "eval/bleu", 2.5, 97, "held-out pairs")
    assert bleu.verdict(2.0) == (
        "held-out BLEU 2.0, word lookup 2.5: 0.5 worse on 97 held-out pairs"
    )
    assert (loss.key, bleu.key) == ("unigram_cross_entropy", "word_lookup_bleu")


def test_a_difference_of_percentages_is_in_points():
    accuracy = Baseline("majority class", "eval/accuracy", 0.164, 25, "held-out words")
    assert accuracy.verdict(0.844).endswith("16.4%: 68.0 points better on 25 held-out words")
