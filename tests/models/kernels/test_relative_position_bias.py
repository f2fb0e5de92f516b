"""A bias by distance, written out and in blocks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias

BIAS = RelativePositionBias(jnp.asarray([[10, 20, 30, 40, 50], [0, 1, 2, 3, 4]], jnp.float32))


def test_a_distance_beyond_the_reach_counts_as_the_reach():
    dense = BIAS.dense(AttentionMask(), 2, 5)
    assert dense.tolist() == [
        [[[30, 40, 50, 50, 50], [20, 30, 40, 50, 50]], [[2, 3, 4, 4, 4], [1, 2, 3, 4, 4]]]
    ]


def test_distances_go_by_positions_where_these_are_given():
    queries, keys = jnp.array([[5], [0]]), jnp.array([[5, 4, 9], [1, 7, 0]])
    mask = AttentionMask(query_positions=queries, key_positions=keys)
    assert BIAS.dense(mask, 1, 3)[:, 0].tolist() == [[[30, 20, 50]], [[40, 50, 30]]]


@pytest.mark.parametrize(("reach", "size"), [(1, 4), (4, 4), (5, 4), (9, 4), (9, 1)])
def test_blocks_are_those_of_the_bias_written_out(reach, size):
    bias = RelativePositionBias(jnp.arange(2 * reach + 1, dtype=jnp.float32)[None])
    dense = np.asarray(bias.dense(AttentionMask(), 6 * size, 6 * size))[0]
    blocks, away = np.asarray(bias.blocks(size)), bias.blocks_away(size)
    assert blocks.shape == (1, 2 * away + 1, size, size)
    for i in range(6):
        for j in range(6):
            part = dense[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            np.testing.assert_array_equal(blocks[:, np.clip(j - i, -away, away) + away], part)
