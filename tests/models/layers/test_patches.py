"""Cutting images into patches, and tables of their positions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flax_transformers.models.layers.patches import (
    cubic_weights,
    cut_patches,
    resize_positions,
    sincos_table,
)
from flax_transformers.testing import relative_difference
from tests.golden import resize as golden


def test_patches_come_row_by_row_and_keep_channel_row_and_column():
    image = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = np.asarray(cut_patches(image, 2))
    assert patches.shape == (2, 6, 3, 2, 2)
    np.testing.assert_array_equal(patches[1, 4], image[1, :, 2:4, 2:4])


def test_pixels_that_fill_no_patch_are_left_out():
    image = np.arange(1 * 1 * 5 * 7).reshape(1, 1, 5, 7)
    np.testing.assert_array_equal(cut_patches(image, 2), cut_patches(image[:, :, :4, :6], 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", golden.CASES)
def test_positions_are_resized_as_torch_interpolates(case):
    old, new = golden.CASES[case]
    with np.load(golden.__file__.replace(".py", ".npz")) as file:
        expected = file[case]
    found = resize_positions(golden.draw_table(case), old, new)
    assert found.shape == expected.shape
    assert relative_difference(found, expected) < 1e-6


def test_positions_of_the_same_grid_stay_as_they_are_to_the_last_bit():
    table = golden.draw_table("uneven")
    np.testing.assert_array_equal(resize_positions(table, (4, 6), (4, 6)), table)


def test_a_constant_stays_constant_when_it_is_resized():
    np.testing.assert_allclose(cubic_weights(5, 9).sum(axis=1), np.ones(9), rtol=1e-14)


def test_fixed_positions_hold_waves_of_the_column_and_then_of_the_row():
    table = sincos_table((2, 3), 8, tokens=1)
    assert table.shape == (7, 8) and table.dtype == np.float32
    np.testing.assert_array_equal(table[0], np.zeros(8))
    row, column, slow = 1, 2, 10000**-0.5
    waves = [
        wave(place * frequency)
        for place in (column, row)
        for wave in (math.sin, math.cos)
        for frequency in (1.0, slow)
    ]
    np.testing.assert_array_equal(table[1 + row * 3 + column], np.array(waves, np.float32))
