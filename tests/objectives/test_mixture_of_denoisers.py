"""Which corruption an example gets, and that nothing is lost in any."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.objectives.mixture_of_denoisers import (
    UL2_DENOISERS,
    Denoiser,
    MixtureOfDenoisers,
    _suffix_range,
)
from tests.objectives.corruption import (
    BYTES,
    SENTINELS,
    VOCAB,
    assert_shifted,
    example,
    labels_of,
    rebuilt,
    terms_of,
    used,
)

R, X, S = SENTINELS[-3:]
LENGTH = 64


def prepare(count, rng, objective=None, length=LENGTH, vocab=VOCAB):
    source = rng.integers(3, 32000, count)
    row = (objective or MixtureOfDenoisers()).prepare(example(source), rng, vocab, length)
    return source.tolist(), row


def only(mode, density, mean_span):
    return MixtureOfDenoisers(denoisers=(Denoiser(mode, density, mean_span, 1.0),))


def cut_out(row):
    """How many tokens are missing from the inputs, and in how many pieces."""
    sentinels = sum(i in SENTINELS[:-3] for i in labels_of(row))
    return len(labels_of(row)) - 1 - sentinels, sentinels


@pytest.mark.slow
def test_the_source_is_recovered_from_ten_thousand_examples():
    rng, objective = np.random.default_rng(1), MixtureOfDenoisers()
    longest = objective.window_spec(LENGTH).length
    for number in range(10_000):
        count = longest if number % 2 else int(rng.integers(1, longest + 1))
        source, row = prepare(count, rng, objective)
        mode, *inputs = used(row, "input_ids")
        assert mode in (R, X, S)
        assert rebuilt(inputs, labels_of(row), SENTINELS[:-3], 1) == source
        assert_shifted(row, VOCAB.pad_id)


@pytest.mark.parametrize("length", [16, 17, 64, 100, 512])
def test_examples_have_fixed_shapes_and_dtypes(length):
    objective, rng = MixtureOfDenoisers(), np.random.default_rng(2)
    longest, width = objective.window_spec(length).length, objective.predictions(length)
    for _ in range(30):
        _, row = prepare(longest, rng, objective, length)
        assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == {
            "input_ids": ((length,), "int32"),
            "attention_mask": ((length,), "int32"),
            "decoder_input_ids": ((width,), "int32"),
            "decoder_attention_mask": ((width,), "int32"),
            "labels": ((width,), "int32"),
            "weights": ((width,), "float32"),
        }


def test_windows_are_as_long_as_the_least_shortened_inputs_allow():
    # 0.85 of the tokens, a sentinel for each third of the rest, the mode, the end, a span spare.
    objective = MixtureOfDenoisers()
    assert (objective.window_spec(512).length, objective.predictions(512)) == (566, 379)
    assert objective.window_spec(512).cross_documents


@pytest.mark.parametrize("density", [0.25, 0.6])
def test_targets_are_as_long_as_the_end_of_a_window_of_any_length(density):
    objective = MixtureOfDenoisers(
        denoisers=(Denoiser("R", 0.15, 3.0, 1.0), Denoiser("S", density, None, 1.0))
    )
    longest, width = objective.window_spec(512).length, objective.predictions(512)
    ends = {count: _suffix_range(count, density, 512 - 3)[1] for count in range(1, longest + 1)}
    assert width == 2 + max(ends.values())
    rng = np.random.default_rng(5)
    count = max(ends, key=ends.get)
    assert max(len(labels_of(prepare(count, rng, objective, 512)[1])) for _ in range(20)) <= width


def test_modes_are_drawn_by_their_shares():
    rng, draws = np.random.default_rng(3), 4000
    rows = (prepare(100, rng, length=100)[1] for _ in range(draws))
    modes = [int(row["input_ids"][0]) for row in rows]
    for mode, share in ((R, 0.4), (X, 0.4), (S, 0.2)):
        assert abs(modes.count(mode) - draws * share) < 4 * np.sqrt(draws * share * (1 - share))


def test_a_continuation_is_asked_for_by_the_mode_a_text_and_the_first_sentinel():
    """As docs/generation.md writes prompts; the end is that of the frame."""
    source, row = prepare(20, np.random.default_rng(6), only("S", 0.25, None))
    mode, *text, sentinel, end = used(row, "input_ids")
    assert (mode, sentinel) == (S, SENTINELS[0])
    assert (end,) == MixtureOfDenoisers().frame(VOCAB).after
    assert text == source[: len(text)] and labels_of(row) == [sentinel, *source[len(text) :], end]


@pytest.mark.slow
def test_each_denoiser_is_drawn_by_its_share():
    rng, draws = np.random.default_rng(4), 3000
    # 400 tokens: which denoiser it was shows in the counts.
    expected = {(60, 20): 0.2, (60, 8): 0.2, (200, 67): 0.1, (200, 25): 0.1, (60, 1): 0.1}
    expected[200, 3] = 0.1
    objective = MixtureOfDenoisers(roll=False)
    found = dict.fromkeys(expected, 0)
    for _ in range(draws):
        row = prepare(400, rng, objective, 400)[1]
        if row["input_ids"][0] != S:
            found[cut_out(row)] += 1
    for kind, share in expected.items():
        assert abs(found[kind] - draws * share) < 4 * np.sqrt(draws * share * (1 - share))


def test_the_settings_are_those_of_the_paper():
    assert {(d.mode, d.noise_density, d.mean_span) for d in UL2_DENOISERS} == {
        ("R", 0.15, 3.0), ("R", 0.15, 8.0), ("S", 0.25, None),
        ("X", 0.5, 3.0), ("X", 0.5, 8.0), ("X", 0.15, 64.0), ("X", 0.5, 64.0),
    }  # fmt: skip
    assert sum(d.share for d in UL2_DENOISERS) == pytest.approx(1.0)


@pytest.mark.slow
def test_a_sequential_denoiser_cuts_off_a_quarter_of_the_text_in_the_mean():
    objective, rng = MixtureOfDenoisers(), np.random.default_rng(5)
    longest = objective.window_spec(512).length
    shares = []
    while len(shares) < 1000:
        _, row = prepare(longest, rng, objective, 512)
        if row["input_ids"][0] == S:
            tokens, pieces = cut_out(row)
            assert pieces == 1
            assert used(row, "input_ids")[-2] == SENTINELS[0]  # the text before it is whole
            shares.append(tokens / longest)
    # Evenly from 57 to 226 of 566 tokens.
    assert min(shares) < 0.11 and max(shares) > 0.39
    assert abs(np.mean(shares) - 0.25) < 4 * 0.0864 / np.sqrt(1000)


def test_a_mixture_of_suffixes_is_a_prefix_language_model():
    objective, rng = only("S", 0.25, None), np.random.default_rng(6)
    assert objective.window_spec(LENGTH).length == LENGTH
    for count in (1, 2, 3, LENGTH):
        for _ in range(50):
            source, row = prepare(count, rng, objective)
            mode, *inputs = used(row, "input_ids")
            assert mode == S
            assert rebuilt(inputs, labels_of(row), SENTINELS, 1) == source


def test_modes_can_be_tokens_of_ones_choice():
    objective, rng = MixtureOfDenoisers(mode_ids=(50, 51, SENTINELS[0])), np.random.default_rng(7)
    modes, first_sentinels = set(), set()
    for _ in range(100):
        _, row = prepare(40, rng, objective)
        modes.add(int(row["input_ids"][0]))
        first_sentinels.add(labels_of(row)[0])
    assert modes == {50, 51, SENTINELS[0]}
    assert first_sentinels == {SENTINELS[1]}  # what is a mode is no sentinel


def test_modes_that_are_no_ids_are_refused():
    objective = MixtureOfDenoisers(mode_ids=(50, 51, 32100))
    with pytest.raises(UserError, match="mode_ids are .*ids from 0 to 32099"):
        prepare(10, np.random.default_rng(0), objective)


def test_too_few_sentinels_are_refused_by_length():
    # Half of the tokens in spans of three: 97 sentinels are not enough for long.
    rng = np.random.default_rng(0)
    prepare(10, rng, length=512)
    with pytest.raises(UserError, match="sequences of 640 tokens.* need 119 sentinels.* has 97"):
        prepare(10, rng, length=640)
    with pytest.raises(UserError, match="the tokenizer has 0"):
        prepare(10, rng, vocab=dataclasses.replace(VOCAB, sentinel_ids=()))


def test_bytes_have_sentinels_and_modes():
    objective, rng = MixtureOfDenoisers(), np.random.default_rng(8)
    row = objective.prepare(example(rng.integers(35, 125, 60)), rng, BYTES, LENGTH)
    assert row["input_ids"][0] in (161, 160, 159)


def test_sequences_that_are_too_short_are_refused():
    with pytest.raises(UserError, match="sequences of 15 tokens are too short"):
        MixtureOfDenoisers().window_spec(15)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("R", 0.15, 3.0, 0.0), "share is 0.0; it must be positive"),
        (("Y", 0.15, 3.0, 1.0), "mode is 'Y'; it must be 'R', 'X' or 'S'"),
        (("R", 1.5, 3.0, 1.0), r"noise_density is 1.5; it must be in \(0, 1\)"),
        (("R", 0.15, 0.5, 1.0), "mean_span is 0.5; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Denoiser(*settings)


def test_a_mixture_of_no_denoisers_is_refused():
    with pytest.raises(ValueError, match="denoisers is empty"):
        MixtureOfDenoisers(denoisers=())


def test_terms_count_positions_with_a_weight():
    batch = {
        "input_ids": np.zeros((2, 4), np.int32),
        "decoder_input_ids": np.array([[0, 5, 6], [0, 0, 0]], np.int32),
        "labels": np.array([[5, 5, 0], [0, 0, 0]], np.int32),
        "weights": np.array([[1, 1, 0], [0, 0, 0]], np.float32),
    }
    losses, metrics = terms_of(MixtureOfDenoisers(), batch)
    loss = pytest.approx(2 * np.log(np.exp(4.0) + 11) - 4.0, rel=1e-6)
    assert losses == {"mixture_of_denoisers": (loss, 2.0, 1.0)}
    assert metrics == {"loss": (loss, 2.0), "accuracy": (1.0, 2.0)}
