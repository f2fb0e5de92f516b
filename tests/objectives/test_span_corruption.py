"""What span corruption cuts out, and that nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.objectives.span_corruption import (
    BYT5_MEAN_SPAN,
    SpanCorruption,
    corrupt,
    corrupted_lengths,
    row_lengths,
    span_counts,
    span_mask,
)
from tests.objectives.corruption import (
    BYTES,
    SENTINELS,
    TEXT_BYTES,
    VOCAB,
    assert_shifted,
    example,
    labels_of,
    rebuilt,
    terms_of,
    used,
    without,
)


def prepare(tokens, length=64, rng=0, vocab=VOCAB, **settings):
    raw = example(tokens)
    return SpanCorruption(**settings).prepare(raw, np.random.default_rng(rng), vocab, length)


@pytest.mark.parametrize(
    ("length", "mean_span", "expected"),
    [(512, 3.0, (568, 114)), (1024, 3.0, (1137, 229)), (1024, BYT5_MEAN_SPAN, (1193, 189))],
)
def test_lengths_are_those_of_the_reference(length, mean_span, expected):
    objective = SpanCorruption(mean_span=mean_span, roll=False)
    spec = objective.window_spec(length)
    assert (spec.length, objective.predictions(length)) == expected
    assert spec.cross_documents


def test_a_rotated_mask_reserves_one_position_for_a_divided_span():
    objective = SpanCorruption()
    assert (objective.window_spec(512).length, objective.predictions(512)) == (567, 115)


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 8.0])
def test_lengths_are_the_largest_that_fit(density, mean_span):
    for length in range(8, 300, 7):
        tokens = 2
        while corrupted_lengths(tokens + 1, density, mean_span)[0] <= length:
            tokens += 1
        inputs, targets = corrupted_lengths(tokens, density, mean_span)
        if density == 0.5 and targets > inputs:
            tokens, targets = tokens - 1, targets - 1
        assert row_lengths(length, density, mean_span) == (tokens, targets)


def test_a_full_sequence_has_no_padding():
    row = prepare(range(100, 668), 512, roll=False)
    assert row["attention_mask"].all() and row["weights"].all()
    assert len(row["labels"]) == 114


def test_examples_have_fixed_shapes_and_dtypes():
    for count in (1, 2, 10, 69):
        row = prepare(range(100, 100 + count))
        assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == {
            "input_ids": ((64,), "int32"),
            "attention_mask": ((64,), "int32"),
            "decoder_input_ids": ((15,), "int32"),
            "decoder_attention_mask": ((15,), "int32"),
            "labels": ((15,), "int32"),
            "weights": ((15,), "float32"),
        }


def test_the_papers_example_comes_out_as_in_its_figure():
    # thank you for inviting me to your party last week
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    inputs, targets = corrupt(np.arange(10, 20, dtype=np.int32), mask, np.array(SENTINELS), 1)
    assert inputs.tolist() == [10, 11, 32099, 14, 15, 16, 17, 32098, 19, 1]
    assert targets.tolist() == [32099, 12, 13, 32098, 18, 1]


def test_sentinels_descend_in_the_same_order_on_both_sides():
    row = prepare(range(100, 668), 512, roll=False)
    expected = list(range(32099, 32099 - 28, -1))
    for ids in (used(row, "input_ids"), labels_of(row)):
        assert [i for i in ids if i in SENTINELS] == expected


@pytest.mark.slow
def test_the_source_is_recovered_from_ten_thousand_t5_examples():
    rng = np.random.default_rng(1)
    for number in range(10_000):
        objective = SpanCorruption(roll=number % 3 > 0)
        longest = objective.window_spec(64).length
        count = longest if number % 2 else int(rng.integers(1, longest + 1))
        source = rng.integers(3, 32000, count)
        row = objective.prepare(example(source), rng, VOCAB, 64)
        found = rebuilt(used(row, "input_ids"), labels_of(row), SENTINELS, 1)
        assert found == source.tolist()


@pytest.mark.full
@pytest.mark.slow
def test_the_source_is_recovered_from_ten_thousand_byt5_examples():
    rng, objective = np.random.default_rng(2), SpanCorruption(mean_span=BYT5_MEAN_SPAN)
    longest = objective.window_spec(128).length
    for number in range(10_000):
        count = longest if number % 2 else int(rng.integers(1, longest + 1))
        source = rng.choice(TEXT_BYTES, count)
        row = objective.prepare(example(source), rng, BYTES, 128)
        found = rebuilt(used(row, "input_ids"), labels_of(row), BYTES.sentinel_ids, 1)
        assert found == source.tolist()


def test_byte_sentinels_descend_from_258():
    row = prepare(np.resize(TEXT_BYTES, 1193), 1024, vocab=BYTES, mean_span=20.0, roll=False)
    found = [i for i in labels_of(row) if i > 247]
    assert found == list(range(258, 249, -1))


def test_a_mask_that_is_not_rolled_begins_kept_and_ends_cut_with_exact_counts():
    rng = np.random.default_rng(3)
    for length in (2, 3, 10, 100, 568):
        noise, spans = span_counts(length, 0.15, 3.0)
        for _ in range(50):
            mask = span_mask(length, 0.15, 3.0, rng, roll=False)
            assert not mask[0] and mask[-1]
            assert mask.sum() == noise
            assert np.count_nonzero(mask[1:] & ~mask[:-1]) == spans


def test_all_masks_with_the_same_counts_are_equally_likely():
    rng, draws = np.random.default_rng(4), 15_000
    found: dict[bytes, int] = {}
    for _ in range(draws):
        mask = span_mask(10, 0.4, 2.0, rng, roll=False)
        found[mask.tobytes()] = found.get(mask.tobytes(), 0) + 1
    # 4 tokens in 2 spans and 6 in 2 stretches: 3 * 5 ways.
    assert len(found) == 15
    expected = draws / 15
    chi_square = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi_square < 36.1  # 0.999 of 14 degrees of freedom


@pytest.mark.slow
def test_a_rolled_mask_cuts_out_every_token_equally_often():
    rng, draws, length = np.random.default_rng(5), 20_000, 40
    found = sum(span_mask(length, 0.15, 3.0, rng, roll=True).astype(int) for _ in range(draws))
    expected = draws * 6 / length
    chi_square = np.sum((found - expected) ** 2) / (expected * (1 - 6 / length))
    assert found.sum() == draws * 6
    assert chi_square < 73.4  # 0.999 of 40 degrees of freedom; without the roll it is 250,000


def test_without_rolling_the_first_token_is_always_kept_and_the_last_cut():
    rng = np.random.default_rng(6)
    masks = np.array([span_mask(40, 0.15, 3.0, rng, roll=False) for _ in range(200)])
    assert not masks[:, 0].any() and masks[:, -1].all()


def test_the_first_input_of_the_decoder_is_padding_or_the_configured_id():
    row = prepare(range(100, 160))
    assert_shifted(row, VOCAB.pad_id)
    assert_shifted(prepare(range(100, 160), decoder_start_id=5), 5)


def test_a_single_token_is_kept():
    row = prepare([100])
    assert used(row, "input_ids") == [100, 1]
    assert labels_of(row) == [1]


def test_documents_follow_one_another_without_a_sign():
    objective, rng = SpanCorruption(), np.random.default_rng(0)
    row = objective.prepare(example(range(100, 130), [10, 20]), rng, VOCAB, 64)
    source = rebuilt(used(row, "input_ids"), labels_of(row), SENTINELS, 1)
    assert source == list(range(100, 130))


def test_too_few_sentinels_are_refused_by_length_and_density():
    objective, raw = SpanCorruption(roll=False), example(range(3, 20))
    rng = np.random.default_rng(0)
    objective.prepare(raw, rng, VOCAB, 1809)
    message = r"sequences of 1810 tokens, noise_density 0.15 and mean_span 3.0 need 101 sentinels"
    with pytest.raises(UserError, match=message):
        objective.prepare(raw, rng, VOCAB, 1810)


def test_sequences_too_short_for_two_tokens_are_refused():
    with pytest.raises(UserError, match="sequences of 2 tokens are too short"):
        SpanCorruption().window_spec(2)


def test_sep_is_used_without_an_end_of_sequence_token():
    vocab = dataclasses.replace(VOCAB, eos_id=None, sep_id=7)
    row = prepare(range(100, 120), vocab=vocab)
    assert used(row, "input_ids")[-1] == labels_of(row)[-1] == 7
    with pytest.raises(UserError, match="neither an end-of-sequence token nor"):
        prepare(range(100, 120), vocab=without(VOCAB, "eos_id"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"noise_density": 0.0}, "noise_density is 0.0"),
        ({"noise_density": 1.0}, "noise_density is 1.0"),
        ({"mean_span": 0.5}, "mean_span is 0.5"),
        ({"mean_span": float("nan")}, "mean_span is nan"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        SpanCorruption(**settings)


def test_equal_random_numbers_give_equal_examples_and_others_do_not():
    one, same, other = (prepare(range(100, 160), rng=rng) for rng in (8, 8, 9))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["input_ids"] != other["input_ids"]).any()


BATCH = {
    "input_ids": np.zeros((1, 4), np.int32),
    "decoder_input_ids": np.array([[0, 5, 6]], np.int32),
    "labels": np.array([[5, 5, 0]], np.int32),
    "weights": np.array([[1, 1, 0]], np.float32),
}
LOG_Z = np.log(np.exp(4.0) + 11)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_metrics_are_plain_cross_entropy_and_accuracy_for_any_loss(label_smoothing):
    losses, metrics = terms_of(SpanCorruption(label_smoothing=label_smoothing), BATCH)
    plain = pytest.approx(2 * LOG_Z - 4.0, rel=1e-6)  # wrong once, right once
    assert metrics == {"loss": (plain, 2.0), "accuracy": (1.0, 2.0)}
    uniform = 2 * (LOG_Z - 4.0 / 12)
    trained = (1 - label_smoothing) * (2 * LOG_Z - 4.0) + label_smoothing * uniform
    assert losses == {"span_corruption": (pytest.approx(trained, rel=1e-6), 2.0, 1.0)}


def test_an_example_of_zeros_has_no_weight():
    both = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in BATCH.items()}
    assert terms_of(SpanCorruption(), both) == terms_of(SpanCorruption(), BATCH)


def test_people_see_both_sides_without_padding():
    row = prepare(range(100, 120))
    encoder, decoder = SpanCorruption().example_views(row)
    assert (encoder.name, decoder.name) == ("encoder", "decoder")
    assert encoder.ids.tolist() == used(row, "input_ids")
    assert decoder.ids.tolist() == [*used(row, "decoder_input_ids"), labels_of(row)[-1]]
    assert decoder.labels.tolist() == [-1, *labels_of(row)]


def test_labels_and_inputs_correspond_by_position():
    row = prepare(range(100, 160))
    pairs = itertools.pairwise(labels_of(row))
    following = zip(used(row, "decoder_input_ids")[1:], labels_of(row)[1:], strict=True)
    assert list(pairs) == list(following)
