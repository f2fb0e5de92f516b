"""Filling masks, with models that give fixed logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.data.tokenizers.facts import NO_FACTS, Facts
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.generation.fill_mask import (
    Filled,
    MaskedToken,
    fill_mask,
    format_samples,
    held_out_samples,
)
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import Frame, ModelFunctions, Vocabulary
from flax_transformers.testing import GivenLogits

PIECES = ["<pad>", "[CLS]", "the", "cat", "##s", "sat", "[MASK]", "on", "a", "mat", ".", "[SEP]"]
PADDED = 16  # rows of the model's table


class Words:
    """Texts are pieces with spaces between them."""

    facts = NO_FACTS

    def __init__(self, word_start=True):
        starts = np.array([not piece.startswith("##") for piece in PIECES])
        self.vocabulary = Vocabulary(
            size=len(PIECES),
            pad_id=0,
            cls_id=1,
            sep_id=11,
            mask_id=6,
            special_ids=(0, 1, 6, 11),
            word_start=starts if word_start else None,
        )

    def encode_batch(self, texts):
        return [np.array([PIECES.index(p) for p in t.split()], np.int32) for t in texts]

    def encode_prompt(self, text):
        return self.encode_batch([text.replace("[MASK]", " [MASK] ")])[0]

    def pieces(self, ids):
        return [PIECES[int(i)] for i in ids]

    def decode(self, ids):
        return " ".join(self.pieces(ids)).replace(" ##", "")


class Told:
    """A model that finds ``answers[position]`` likeliest: a dict of id to logit, others at 0."""

    def __init__(self, answers):
        self.table = np.zeros((64, PADDED), np.float32)
        for position, logits in answers.items():
            for piece, logit in logits.items():
                self.table[position, piece] = logit
        self.seen = []
        self.functions = ModelFunctions(self.hidden_states, self.unembedding, head=None)

    def hidden_states(self, params, batch, rngs):
        assert not rngs, "no dropout"
        self.seen.append({name: np.asarray(value)[0] for name, value in batch.items()})
        return HiddenStates(jnp.asarray(self.table)[None, : batch["input_ids"].shape[1]])

    def unembedding(self, params, hidden):
        return GivenLogits(hidden)


def fill(text, answers, top=2, max_length=64):
    model = Told(answers)
    with jax.disable_jit():  # the model looks at its input
        found = fill_mask(model.functions, {}, Words(), text, top=top, max_length=max_length)
    return found, model


@pytest.mark.slow
def test_the_most_likely_tokens_come_first_with_their_probabilities():
    filled, _ = fill("the [MASK] sat", {2: {3: 4.0, 9: 3.0}})
    (token,) = filled.masked
    assert [piece for piece, _ in token.candidates] == ["cat", "mat"]
    # Of twelve pieces four are special: eight can be told, six of them with logit 0.
    total = np.exp(4) + np.exp(3) + 6
    np.testing.assert_allclose(
        [p for _, p in token.candidates], [np.exp(4) / total, np.exp(3) / total], rtol=1e-5
    )
    assert (filled.text, token.truth) == ("the [MASK] sat", None)


def test_special_and_padding_ids_are_no_candidates():
    logits = dict.fromkeys((0, 1, 6, 11, *range(12, PADDED)), 50.0) | {9: 1.0}
    filled, _ = fill("the [MASK]", {2: logits}, top=100)
    (token,) = filled.masked
    assert token.candidates[0][0] == "mat"
    assert {piece for piece, _ in token.candidates} == set(PIECES) - {
        "<pad>", "[CLS]", "[MASK]", "[SEP]",
    }  # fmt: skip
    assert sum(p for _, p in token.candidates) == pytest.approx(1.0)


@pytest.mark.slow
def test_several_masks_are_filled_in_order():
    answers = {1: {2: 9.0}, 3: {5: 9.0}, 4: {7: 9.0}, 7: {10: 9.0}}
    filled, _ = fill("[MASK] cat [MASK][MASK] the mat [MASK]", answers, top=1)
    assert [token.candidates[0][0] for token in filled.masked] == ["the", "sat", "on", "."]


def test_the_model_reads_special_tokens_and_padding_is_masked():
    _, model = fill("the [MASK] sat", {})
    (batch,) = model.seen
    assert batch["input_ids"].tolist() == [1, 2, 6, 5, 11] + [0] * 11
    assert batch["attention_mask"].tolist() == [1] * 5 + [0] * 11


@pytest.mark.parametrize(("words", "rows"), [(13, 16), (14, 32), (29, 32), (30, 40), (37, 40)])
def test_rows_are_padded_to_a_power_of_two_within_the_models_limit(words, rows):
    """Positions that the model has no vectors for would be NaN, and spread from the padding."""
    _, model = fill("cat " * words + "[MASK]", {}, max_length=40)
    assert len(model.seen[0]["input_ids"]) == rows


def test_a_text_without_a_mask_is_refused():
    with pytest.raises(UserError, match=r"the text has no \[MASK\]; add one"):
        fill("the cat", {})


def test_a_text_that_is_too_long_is_refused_with_both_lengths():
    with pytest.raises(UserError, match="the text has 41 tokens, but the model takes 40; shorten"):
        fill("cat " * 38 + "[MASK]", {}, max_length=40)


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = Words()
    tokenizer.vocabulary = dataclasses.replace(tokenizer.vocabulary, mask_id=None)
    with pytest.raises(UserError, match="the model's tokenizer has no mask token"):
        fill_mask(Told({}).functions, {}, tokenizer, "a [MASK]", max_length=9)


def test_a_token_that_the_model_lacks_is_refused():
    with pytest.raises(
        UserError, match="the text has the token 'mat' with id 9, but the model has only 9"
    ):
        fill_mask(Told({}).functions, {}, Words(), "mat [MASK] mat", vocab_size=9)


def test_tokens_that_the_model_lacks_are_no_candidates():
    """Its logit would be NaN. With 10 tokens [SEP] is one too, but the text is framed with it."""
    tokenizer = Words()
    tokenizer.vocabulary = dataclasses.replace(
        tokenizer.vocabulary, frame=Frame(before=(1,)), special_ids=(0, 1, 6)
    )
    model = Told({2: {3: 4.0}})
    model.table = model.table[:, :10]
    with jax.disable_jit():
        filled = fill_mask(model.functions, {}, tokenizer, "the [MASK]", top=12, vocab_size=10)
    (token,) = filled.masked
    assert {piece for piece, _ in token.candidates} == {*PIECES[2:6], *PIECES[7:10]}
    assert sum(p for _, p in token.candidates) == pytest.approx(1.0)


def test_the_special_tokens_recorded_by_a_run_are_added():
    tokenizer = Words()
    tokenizer.facts = Facts(record={"frame": [[8], [10, 11]]})
    model = Told({})
    with jax.disable_jit():
        fill_mask(model.functions, {}, tokenizer, "the [MASK]")
    assert model.seen[0]["input_ids"].tolist()[:5] == [8, 2, 6, 10, 11]


@pytest.mark.parametrize("top", [0, -1])
def test_a_top_below_1_is_refused(top):
    with pytest.raises(UserError, match=f"top is {top}; it must be at least 1"):
        fill("[MASK]", {}, top=top)


class Store:
    """Held-out sentences, one after the other."""

    def __init__(self, *sentences):
        parts = Words().encode_batch(sentences)
        self._tokens = np.concatenate(parts)
        self.sentence_ends = np.cumsum([len(part) for part in parts]).astype(np.int64)

    def tokens(self, start, length):
        return self._tokens[start : start + length].copy()


LONG = "the cat ##s sat on a mat . . the"
SENTENCES = [LONG, "the cat .", "a mat ##s ##s . on the cat sat on the mat", "cat " * 25]


def samples(*sentences, count=10, max_length=32, seed=0, tokenizer=None):
    model, store = Told({}), Store(*(sentences or SENTENCES))
    settings = {"count": count, "max_length": max_length, "seed": seed}
    with jax.disable_jit():
        found = held_out_samples(model.functions, {}, tokenizer or Words(), store, **settings)
    return found, model


def test_samples_are_sentences_of_fitting_length_with_the_original_token():
    found, model = samples()
    assert len(found) == 2  # the second is too short, the last too long
    rows = {(1, *Words().encode_batch([s])[0].tolist(), 11) for s in SENTENCES}
    for sample, seen in zip(found, model.seen, strict=True):
        (token,) = sample.masked
        row = seen["input_ids"][seen["attention_mask"] == 1]
        assert (row == 6).sum() == sample.text.count("[MASK]") == 1
        assert Words().decode(row[1:-1]) == sample.text
        assert tuple(np.where(row == 6, PIECES.index(token.truth), row).tolist()) in rows
        assert len(token.candidates) == 3


def test_samples_are_drawn_by_the_seed_alone():
    many = [LONG] + [" ".join(np.roll(LONG.split()[3:], k)) + " the cat" for k in range(5)]
    drawn = [[s.text for s in samples(*many, seed=seed, count=3)[0]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3


def truths(sentence, **settings):
    return {samples(sentence, seed=s, **settings)[0][0].masked[0].truth for s in range(60)}


def test_masked_tokens_are_whole_words():
    # "cat ##s" is a word of two pieces, "." no word.
    assert truths(LONG) == {"the", "sat", "on", "a", "mat"}


def test_where_no_word_is_whole_any_ordinary_piece_is_a_gap():
    assert truths("[CLS] cat ##s sat ##s mat ##s .") == {"cat", "##s", "sat", "mat", "."}
    assert truths(LONG, tokenizer=Words(word_start=False)) == set(LONG.split())


def test_masked_bytes_are_not_always_spaces():
    store = Store("cat")
    store._tokens = ByteTokenizer().encode_batch(["a row of bytes.  "])[0]
    store.sentence_ends = np.array([len(store._tokens)])
    nothing = ModelFunctions(
        lambda params, batch, rngs: HiddenStates(jnp.zeros((*batch["input_ids"].shape, 384))),
        lambda params, hidden: GivenLogits(hidden),
        head=None,
    )
    settings = {"count": 1, "max_length": 32}
    found = set()
    for seed in range(20):
        drawn = held_out_samples(nothing, {}, ByteTokenizer(), store, seed=seed, **settings)
        found.add(drawn[0].masked[0].truth)
    assert len(found - {" "}) > 3


def test_a_sentence_of_special_tokens_is_left_out():
    assert samples("[CLS] " * 9)[0] == []


def test_an_empty_store_has_no_samples():
    store = Store("cat")
    store.sentence_ends = np.zeros(0, np.int64)
    assert held_out_samples(Told({}).functions, {}, Words(), store, count=3, max_length=9) == []


def test_samples_are_shown_with_percentages_and_the_truth():
    token = MaskedToken([("cat", 0.5), ("mat", 0.256)], truth="sat")
    shown = format_samples(
        [Filled("a [MASK].", [token]), Filled("[MASK]", [MaskedToken([("on", 1.0)])])]
    )
    assert shown.splitlines() == [
        "a [MASK].",
        "    cat 50%  mat 26%  (was: sat)",
        "[MASK]",
        "    on 100%",
    ]
