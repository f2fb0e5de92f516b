"""What masked language modelling does to a row, and what it makes of a model's answers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.models.outputs import HiddenStates
from flax_transformers.objectives.base import ModelFunctions, Vocabulary
from flax_transformers.objectives.masked_lm import MaskedLM, geometric_span_lengths
from flax_transformers.objectives.rows import random_ordinary
from flax_transformers.testing import GivenLogits

# Special ids at both ends and scattered between ordinary ones.
VOCAB = Vocabulary(
    size=60,
    pad_id=0,
    unk_id=31,
    cls_id=7,
    sep_id=8,
    mask_id=59,
    special_ids=(59, 0, 31, 7, 8),
)
WORDS = dataclasses.replace(VOCAB, word_start=np.arange(VOCAB.size) % 3 != 2)
"""Every third piece goes on with a word."""
ORDINARY = np.setdiff1d(np.arange(VOCAB.size), VOCAB.special_ids)
LENGTH = 40


def example(tokens, ends=()):
    return {"tokens": np.array(tokens, np.int32), "document_ends": np.array(ends, np.int32)}


def random_window(rng, spec, unknown=0.0):
    """As long as ``spec`` allows or shorter, with document ends and some unknown tokens."""
    used = int(rng.choice([spec.length, rng.integers(1, spec.length + 1)]))
    separators = int(rng.integers(0, min(5, (used + 1) // 2))) if spec.cross_documents else 0
    count = used - separators
    ends = rng.choice(np.arange(1, count), separators, replace=False)
    if rng.random() < 0.5:
        ends = np.append(ends, count)  # an end at the window's end needs no further separator
    tokens = rng.choice(ORDINARY, count)
    tokens[rng.random(count) < unknown] = VOCAB.unk_id
    return example(tokens, np.sort(ends))


def prepare(raw, rng=0, length=LENGTH, vocab=WORDS, **settings):
    return MaskedLM(**settings).prepare(raw, np.random.default_rng(rng), vocab, length)


def chosen_of(row):
    """Positions, labels and what stands there now."""
    real = row["masked_weights"] == 1
    positions = row["masked_positions"][real]
    return positions, row["masked_labels"][real], row["input_ids"][positions]


def framed(raw):
    """The row before masking, put together the slow way."""
    row, count = [VOCAB.cls_id], len(raw["tokens"])
    for place, token in enumerate(raw["tokens"].tolist(), 1):
        row.append(token)
        if place in raw["document_ends"] and place < count:
            row.append(VOCAB.sep_id)
    return [*row, VOCAB.sep_id]


def words_of(row):
    """The positions of each word of a framed row."""
    words, before = [], True
    for place, token in enumerate(row):
        special = token in VOCAB.special_ids
        if not special and (before or WORDS.word_start[token]):
            words.append([])
        if not special:
            words[-1].append(place)
        before = special
    return words


def even(counts):
    """Whether counts of independent draws are as even as chance makes them (chi-square, within four
    standard deviations)."""
    expected, degrees = counts.sum() / len(counts), len(counts) - 1
    statistic = np.sum((counts - expected) ** 2) / expected
    return abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def within(successes, trials, share):
    """Whether a count is within five standard deviations of a binomial's mean."""
    return abs(successes - trials * share) < 5 * np.sqrt(trials * share * (1 - share))


def test_examples_have_fixed_shapes_and_dtypes():
    row = prepare(example([3, 4, 5, 6]))
    assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == {
        "input_ids": ((40,), "int32"),
        "attention_mask": ((40,), "int32"),
        "masked_positions": ((6,), "int32"),  # round(0.15 * 38)
        "masked_labels": ((6,), "int32"),
        "masked_weights": ((6,), "float32"),
    }


CHOICES = pytest.mark.parametrize("choose", ["token", "word", "span"])


@CHOICES
def test_an_exact_share_of_the_ordinary_tokens_is_chosen(choose):
    rng, spec = np.random.default_rng(1), MaskedLM().window_spec(LENGTH)
    counts = set()
    for _ in range(300):
        raw = random_window(rng, spec, unknown=rng.choice([0.0, 0.1, 1.0]))
        ordinary = int(np.isin(raw["tokens"], ORDINARY).sum())
        row = prepare(raw, rng, choose=choose)
        expected = max(1, round(0.15 * ordinary)) if ordinary else 0
        assert row["masked_weights"].sum() == expected
        assert len(set(chosen_of(row)[0])) == expected
        counts.add(expected)
    assert counts == {0, 1, 2, 3, 4, 5, 6}


@CHOICES
@pytest.mark.parametrize("cross_documents", [True, False])
def test_labels_put_back_give_the_framed_window(cross_documents, choose):
    rng = np.random.default_rng(2)
    objective = MaskedLM(cross_documents=cross_documents, choose=choose)
    spec = objective.window_spec(LENGTH)
    longest = 0
    for _ in range(300):
        raw = random_window(rng, spec, unknown=0.1)
        before = raw["tokens"].copy()
        row = objective.prepare(raw, rng, WORDS, LENGTH)
        positions, labels, _ = chosen_of(row)
        restored = row["input_ids"].copy()
        restored[positions] = labels
        expected = framed(raw)
        assert restored.tolist() == expected + [VOCAB.pad_id] * (LENGTH - len(expected))
        np.testing.assert_array_equal(row["attention_mask"], np.arange(LENGTH) < len(expected))
        np.testing.assert_array_equal(raw["tokens"], before)
        longest = max(longest, len(expected))
    assert longest == LENGTH


@CHOICES
def test_special_tokens_and_padding_are_never_chosen(choose):
    rng, spec = np.random.default_rng(3), MaskedLM().window_spec(LENGTH)
    for _ in range(300):
        raw = random_window(rng, spec, unknown=0.4)
        positions, labels, _ = chosen_of(prepare(raw, rng, mask_fraction=0.9, choose=choose))
        assert not set(labels.tolist()) & set(VOCAB.special_ids)
        assert (positions < len(framed(raw))).all()


@pytest.mark.slow
@CHOICES
def test_every_position_is_chosen_equally_often(choose):
    rng, found = np.random.default_rng(4), np.zeros(LENGTH)
    raw = example(np.tile([3, 5], 19))  # words of two pieces
    for _ in range(6000):
        positions = chosen_of(prepare(raw, rng, choose=choose))[0]
        found[rng.choice(positions)] += 1  # those of one row depend on one another
    assert found[0] == found[-1] == 0
    assert even(found[1:-1])


def test_whole_words_are_chosen_and_at_most_one_is_cut():
    rng, spec, cut_rows = np.random.default_rng(21), MaskedLM().window_spec(LENGTH), 0
    for _ in range(500):
        raw = random_window(rng, spec, unknown=0.1)
        positions = set(chosen_of(prepare(raw, rng, choose="word"))[0].tolist())
        touched = [word for word in words_of(framed(raw)) if positions & set(word)]
        cut = [word for word in touched if not positions >= set(word)]
        assert len(cut) <= 1
        for word in cut:  # its first pieces, and only if no other word was short enough
            taken = sorted(positions & set(word))
            assert taken == word[: len(taken)]
            rest = [word for word in words_of(framed(raw)) if not positions & set(word)]
            assert all(len(word) > len(taken) for word in rest)
        cut_rows += bool(cut)
    assert cut_rows < 50


def test_a_word_that_is_too_long_is_cut_to_the_count():
    raw = example([3] + [5] * 37)  # one word of 38 pieces
    assert chosen_of(prepare(raw, choose="word"))[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert chosen_of(prepare(raw, choose="span"))[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_the_lengths_of_spans_are_geometric_up_to_ten():
    draws = 100_000
    found = np.bincount(geometric_span_lengths(np.random.default_rng(22), draws), minlength=12)
    expected = 0.2 * 0.8 ** np.arange(10)
    expected *= draws / expected.sum()
    assert found[0] == found[11] == 0
    chi_square = np.sum((found[1:11] - expected) ** 2 / expected)
    assert chi_square < 9 + 4 * np.sqrt(18)
    assert np.arange(12) @ found / draws == pytest.approx(3.8, abs=0.03)  # the paper's mean


def test_spans_are_runs_of_whole_words():
    """In rows long enough the runs that are seen have nearly the mean length of those drawn."""
    rng, lengths, cut = np.random.default_rng(23), [], 0
    for _ in range(40):
        raw = example(rng.choice([3, 4, 5], 510))
        positions = set(chosen_of(prepare(raw, rng, 512, choose="span"))[0].tolist())
        words = words_of(framed(raw))
        chosen = [set(word) <= positions for word in words]
        cut += sum(bool(positions & set(word)) for word in words) - sum(chosen)
        edges = np.diff(np.array([0, *chosen, 0], int))
        lengths.extend(np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0))
    assert cut == 0
    # Runs that touch look like one; the last is cut off at the count.
    assert 3.3 < np.mean(lengths) < 4.3


def test_tokens_of_a_span_share_their_fate():
    rng, whole, mixed = np.random.default_rng(24), 0, 0
    for _ in range(400):
        raw = example(np.arange(9, 30))
        row = prepare(raw, rng, mask_fraction=0.2, choose="span", mask_share=0.5, random_share=0.0)
        positions, labels, now = chosen_of(row)
        if positions[-1] - positions[0] == 3:  # one run of four tokens, or two that touch
            whole += 1
            mixed += 0 < (now == labels).sum() < 4
    assert whole > 100
    assert mixed < whole / 3  # 7 in 8 if each token had a fate of its own


def test_words_end_at_special_tokens():
    raw = example([3, 5, 5, 5], [2])  # in the row 3 5 [SEP] 5 5: two words
    found = {
        tuple(chosen_of(prepare(raw, rng, mask_fraction=0.5, choose="word"))[0].tolist())
        for rng in range(20)
    }
    assert found == {(1, 2), (4, 5)}


def test_without_word_beginnings_whole_words_and_spans_are_refused():
    with pytest.raises(UserError, match="does not define which tokens begin a word"):
        prepare(example([3, 4]), vocab=VOCAB, choose="word")


def test_chosen_tokens_are_masked_replaced_and_kept_eight_one_one():
    rng = np.random.default_rng(5)
    found = np.zeros(3, int)
    raw = example(rng.choice(ORDINARY, 38))
    for _ in range(2000):
        _, labels, now = chosen_of(prepare(raw, rng))
        masked, kept = now == VOCAB.mask_id, now == labels
        found += [masked.sum(), kept.sum(), (~masked & ~kept).sum()]
    trials = found.sum()
    assert trials == 12_000
    # One replacement in as many as there are ordinary ids is the token itself.
    same = 0.1 / len(ORDINARY)
    assert within(found[0], trials, 0.8)
    assert within(found[1], trials, 0.1 + same)
    assert within(found[2], trials, 0.1 - same)


def test_replacements_are_never_special_and_all_ordinary_ids_equally_likely():
    rng, counts = np.random.default_rng(6), np.zeros(VOCAB.size)
    raw = example(np.full(38, 5))
    for _ in range(400):
        row = prepare(raw, rng, mask_fraction=0.9, mask_share=0.0, random_share=1.0)
        np.add.at(counts, chosen_of(row)[2], 1)
    assert not counts[list(VOCAB.special_ids)].any()
    assert all(within(n, counts.sum(), 1 / len(ORDINARY)) for n in counts[ORDINARY])


@pytest.mark.parametrize("special_ids", [(), (0, 1, 2), (17, 18, 19), (0, 5, 6, 19)])
def test_replacements_skip_special_ids_anywhere_in_the_vocabulary(special_ids):
    vocab = Vocabulary(size=20, pad_id=0, special_ids=special_ids)
    found = random_ordinary(np.random.default_rng(7), 600, vocab)
    assert set(found.tolist()) == set(range(20)) - set(special_ids)


def test_with_a_mask_share_of_one_every_chosen_token_is_masked():
    _, _, now = chosen_of(prepare(example(np.full(38, 5)), mask_share=1.0, random_share=0.0))
    assert now.tolist() == [VOCAB.mask_id] * 6


def test_with_shares_of_zero_every_chosen_token_stays():
    raw = example(np.arange(9, 30))
    row = prepare(raw, mask_share=0.0, random_share=0.0)
    assert row["input_ids"][: len(framed(raw))].tolist() == framed(raw)
    assert row["masked_weights"].sum() == 3


def test_an_empty_example_is_two_framing_tokens_without_a_choice():
    row = prepare(example([]))
    assert row["input_ids"].tolist() == [VOCAB.cls_id, VOCAB.sep_id] + [VOCAB.pad_id] * 38
    assert row["attention_mask"].sum() == 2
    assert row["masked_weights"].sum() == 0


def test_equal_random_numbers_give_equal_examples_and_others_do_not():
    raw = example(np.full(38, 5))
    one, same, other = prepare(raw, 8), prepare(raw, 8), prepare(raw, 9)
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["masked_positions"] != other["masked_positions"]).any()


def test_windows_are_shorter_by_the_special_tokens():
    spec = MaskedLM(cross_documents=False).window_spec(128)
    assert (spec.length, spec.cross_documents) == (126, False)
    assert spec.static_epochs is None
    assert MaskedLM().predictions(128) == 19  # round(0.15 * 126)


def test_static_masking_is_asked_of_the_stream():
    assert MaskedLM(static_epochs=10).window_spec(128).static_epochs == 10


def test_the_example_view_has_masked_labels_and_no_padding():
    raw = example([3, 4, 5, 6, 9])
    row = prepare(raw, mask_share=1.0, random_share=0.0)
    (shown,) = MaskedLM().example_views(row)
    places = np.flatnonzero(shown.labels >= 0)
    assert shown.ids[places].tolist() == [VOCAB.mask_id]
    assert np.where(shown.labels < 0, shown.ids, shown.labels).tolist() == framed(raw)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"choose": "sentence"}, "objective.choose is 'sentence'"),
        ({"mask_fraction": 0.0}, "objective.mask_fraction is 0.0"),
        ({"mask_fraction": 1.0}, "objective.mask_fraction is 1.0"),
        ({"mask_fraction": float("nan")}, "objective.mask_fraction is nan"),
        (
            {"mask_share": 0.95},
            "mask_share is 0.95 and objective.random_share is 0.1; they must add up",
        ),
        ({"random_share": -0.1}, r"random_share is -0.1; it must be in \[0, 1\]"),
        ({"mask_share": float("nan")}, "mask_share is nan"),
        ({"random_share": float("nan")}, "random_share is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        MaskedLM(**settings)


@pytest.mark.parametrize("name", ["mask", "cls", "sep"])
def test_a_tokenizer_without_the_tokens_it_takes_is_refused(name):
    vocab = dataclasses.replace(VOCAB, **{f"{name}_id": None})
    with pytest.raises(UserError, match=rf"the tokenizer has no .*\[{name.upper()}\]"):
        MaskedLM().prepare(example([3, 4]), np.random.default_rng(0), vocab, LENGTH)


@dataclasses.dataclass
class Spy:
    """A model whose hidden state is the position and whose logits favour it, as told."""

    unembedded: list = dataclasses.field(default_factory=list)

    def functions(self):
        return ModelFunctions(self.hidden_states, self.unembedding, head=None)

    def hidden_states(self, params, batch, rngs):
        rows, length = batch["input_ids"].shape
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (rows, length))
        return HiddenStates(index[..., None])

    def unembedding(self, params, hidden):
        self.unembedded.append(hidden.shape)
        return GivenLogits(4.0 * (hidden == jnp.arange(10, dtype=jnp.float32)[None, None, :]))


def batch_of(positions, labels, weights):
    return {
        "input_ids": np.zeros((len(positions), 12), np.int32),
        "masked_positions": np.array(positions, np.int32),
        "masked_labels": np.array(labels, np.int32),
        "masked_weights": np.array(weights, np.float32),
    }


def terms_of(batch, spy):
    """Losses and metrics, compiled."""

    def terms(batch):
        found = MaskedLM().terms(spy.functions(), {}, batch, {})
        return found.losses, found.metrics

    return jax.device_get(jax.jit(terms)(batch))


def test_terms_are_sums_over_selected_positions_which_alone_have_logits():
    spy = Spy()
    # Right twice (positions 3 and 7 favour the ids 3 and 7), wrong once; the last place is filler.
    batch = batch_of([[3, 5], [7, 0]], [[3, 1], [7, 0]], [[1, 1], [1, 0]])
    losses, metrics = terms_of(batch, spy)
    assert spy.unembedded == [(2, 2, 1)]
    normalizer = np.log(np.exp(4.0) + 9)
    loss = pytest.approx(2 * (normalizer - 4.0) + normalizer, rel=1e-6)
    assert losses == {"masked_lm": (loss, 3.0, 1.0)}
    assert metrics == {"loss": (loss, 3.0), "accuracy": (2.0, 3.0)}


def test_an_example_of_zeros_has_no_weight():
    one = batch_of([[3, 5]], [[3, 1]], [[1, 1]])
    both = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in one.items()}
    assert terms_of(both, Spy()) == terms_of(one, Spy())
