"""Positions of packed rows, and rotary positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.families.llama import LlamaConfig
from flax_transformers.models.config import Rope
from flax_transformers.models.layers.positions import (
    default_position_ids,
    positions_from_segments,
    rope_frequencies,
    rotary_tables,
    rotate,
)


def test_positions_restart_where_the_segment_changes():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])
    assert positions_from_segments(segments).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_a_row_of_one_token_is_at_position_zero():
    assert positions_from_segments(jnp.array([[3]])).tolist() == [[0]]


@pytest.mark.parametrize(("theta", "width"), [(10000.0, 8), (500000.0, 64), (1e6, 6)])
def test_rotary_frequencies_are_powers_of_theta(theta, width):
    frequencies = rope_frequencies(Rope(theta=theta), width)
    assert frequencies.dtype == np.float32
    expected = [theta ** (-2 * i / width) for i in range(width // 2)]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


def test_linear_scaling_is_a_slower_count_of_positions():
    plain, slow = Rope(), Rope(scaling="linear", factor=4.0)
    np.testing.assert_allclose(
        rope_frequencies(slow, 16), rope_frequencies(plain, 16) / 4, rtol=1e-7
    )
    there = rotary_tables(slow, 16, jnp.array([[4, 8]]))
    np.testing.assert_allclose(there, rotary_tables(plain, 16, jnp.array([[1, 2]])), rtol=1e-6)


def llama3(theta, width, factor, low, high, original):
    """The rule of Llama 3.1 in words: waves that fit ``high`` times into the old context stay,
    those that do not fit ``low`` times are stretched, and between the two the share goes by the
    fit."""
    scaled = []
    for i in range(width // 2):
        frequency = theta ** (-2 * i / width)
        fits = original * frequency / (2 * math.pi)
        kept = min(max((fits - low) / (high - low), 0.0), 1.0)
        scaled.append(kept * frequency + (1 - kept) * frequency / factor)
    return scaled


@pytest.mark.parametrize(
    ("theta", "width", "factor", "low", "high", "original"),
    [
        (500000.0, 128, 8.0, 1.0, 4.0, 8192),
        (500000.0, 64, 32.0, 1.0, 4.0, 8192),
        (10000.0, 32, 3.0, 2.0, 5.0, 512),
    ],
    ids=["llama-3.1", "llama-3.2", "other"],
)
def test_llama3_scaling_stretches_the_slow_waves_alone(theta, width, factor, low, high, original):
    rope = Rope(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_max_positions=original,
    )
    found, plain = rope_frequencies(rope, width), rope_frequencies(Rope(theta=theta), width)
    assert found.dtype == np.float32
    expected = llama3(theta, width, factor, low, high, original)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    # All three kinds occur.
    np.testing.assert_array_equal(found[0], plain[0])
    np.testing.assert_allclose(found[-1], plain[-1] / factor, rtol=1e-6)
    assert np.sum((found < plain) & (found > plain / factor * 1.001)) >= 2


def test_rotary_angles_are_position_times_frequency():
    positions = jnp.array([[0, 1, 7], [100, 3, 3]])
    cos, sin = rotary_tables(Rope(), 8, positions)
    assert cos.shape == sin.shape == (2, 3, 4)
    angle = np.asarray(positions, np.float64)[..., None] * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-5)


def test_rotation_is_multiplication_by_a_phase_of_features_half_a_head_apart():
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7], [100, 3, 3]])
    ours = rotate(jnp.asarray(x), rotary_tables(Rope(), 8, jnp.asarray(positions)))
    angle = positions[:, :, None, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours[0, 0], x[0, 0])


@pytest.mark.slow
def test_bfloat16_is_turned_in_float32_and_rounded_once():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(jnp.bfloat16)
    tables = rotary_tables(Rope(), 8, jnp.array([[0, 500, 1001]]))
    ours = rotate(x, tables)
    assert ours.dtype == jnp.bfloat16
    expected = rotate(x.astype(np.float32), tables).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ours, expected)


def test_dynamic_positions_depend_on_the_longest_position_of_a_row_beyond_those_of_training():
    rope = Rope(theta=100.0, scaling="dynamic", factor=3.0, original_max_positions=4)
    plain = rotary_tables(Rope(theta=100.0), 8, jnp.array([[0, 1, 2, 3]]))
    found = rotary_tables(rope, 8, jnp.array([[0, 1, 2, 3], [0, 1, 2, 9]]))
    for table, expected in zip(found, plain, strict=True):
        np.testing.assert_allclose(table[:1], expected, rtol=1e-6)
    theta = 100.0 * (3.0 * 10 / 4 - 2.0) ** (8 / 6)
    expected = rotary_tables(Rope(theta=theta), 8, jnp.array([[0, 1, 2, 9]]))
    for table, expected_table in zip(found, expected, strict=True):
        np.testing.assert_allclose(table[1:], expected_table, rtol=1e-4, atol=1e-5)


def test_padding_does_not_make_a_row_of_dynamic_positions_longer():
    rope = Rope(theta=100.0, scaling="dynamic", factor=3.0, original_max_positions=4)
    config = LlamaConfig(rope=rope)
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0]])
    found = default_position_ids(config, segments, segments)
    assert found.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0, 0, 0, 0]]
    plain = rotary_tables(Rope(theta=100.0), 8, found)
    for table, expected in zip(rotary_tables(rope, 8, found), plain, strict=True):
        np.testing.assert_allclose(table, expected, rtol=1e-6)
