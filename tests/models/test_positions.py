"""Positions of packed rows, and the sinusoidal table."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from flax_transformers.models.positions import positions_from_segments, sinusoidal_table


def test_positions_restart_where_the_segment_changes():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])
    assert positions_from_segments(segments).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_a_row_of_one_token_is_at_position_zero():
    assert positions_from_segments(jnp.array([[3]])).tolist() == [[0]]


def test_sinusoids_are_sines_then_cosines_from_one_radian_down():
    table = sinusoidal_table(50, 8)
    assert table.dtype == np.float32
    for position in (0, 1, 49):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            assert math.isclose(table[position, i], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[position, 4 + i], math.cos(angle), abs_tol=1e-6)


def test_an_odd_width_ends_in_a_column_of_zeros():
    table = sinusoidal_table(4, 5)
    assert table.shape == (4, 5)
    assert not table[:, 4].any()
    assert table[0].tolist() == [0, 0, 1, 1, 0]
