"""Where a token stands: position numbers and the sinusoidal table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def positions_from_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Position within its own segment, int32 [B, T]: counting restarts where it changes."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)
    start_index_BT = jnp.where(starts_BT, index_T[None, :], 0)
    return index_T[None, :] - jax.lax.cummax(start_index_BT, axis=1)


def sinusoidal_table(max_positions: int, width: int) -> np.ndarray:
    """Fixed positions of the 2017 Transformer, float32 [max_positions, width].

    The first half of the width holds sines and the second half cosines, as in tensor2tensor and
    Marian; arXiv:1706.03762 §3.5 interleaves the two, which is a permutation of the width.
    """
    frequency = 10000.0 ** (-2.0 * np.arange(width // 2) / width)
    angle = np.arange(max_positions)[:, None] * frequency[None, :]
    table = np.zeros((max_positions, width), np.float32)
    table[:, : width // 2] = np.sin(angle)
    table[:, width // 2 : 2 * (width // 2)] = np.cos(angle)
    return table
