"""Position ids and rotary positions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.models.config import Rope, TextConfig


def positions_from_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Position within the segment, int32 [B, T]: counting restarts where the segment changes."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)
    start_index_BT = jnp.where(starts_BT, index_T[None, :], 0)
    return index_T[None, :] - jax.lax.cummax(start_index_BT, axis=1)


def default_position_ids(
    config: TextConfig, input_ids: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Position ids int32 [B, T] of a model that is given none: from 0, restarting in each
    segment."""
    if segment_ids is None:
        return positions_from_segments(jnp.ones_like(input_ids))
    positions_BT = positions_from_segments(segment_ids)
    if config.rope is not None and config.rope.scaling == "dynamic":
        return jnp.where(segment_ids > 0, positions_BT, 0)  # padding does not make a row longer
    return positions_BT


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position for each pair of features of a head, float32 [head_dim // 2]."""
    # In float32 as in the originals: the last bit matters at position 100,000.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(rope.theta) ** exponent
    if rope.scaling == "linear":
        return frequency / np.float32(rope.factor)
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        shortest = rope.original_max_positions / rope.high_frequency_factor
        longest = rope.original_max_positions / rope.low_frequency_factor
        turns = rope.original_max_positions / wavelength
        spread = rope.high_frequency_factor - rope.low_frequency_factor
        ramp = (turns - rope.low_frequency_factor) / spread
        mixed = (1 - ramp) * frequency / rope.factor + ramp * frequency
        scaled = np.where(wavelength > longest, frequency / rope.factor, mixed)
        return np.where(wavelength < shortest, frequency, scaled).astype(np.float32)
    if rope.scaling == "yarn":
        return frequency * (1 - (1 - 1 / np.float32(rope.factor)) * _yarn_ramp(rope, head_dim))
    return frequency


def dynamic_frequencies(rope: Rope, head_dim: int, position_ids_BT: jax.Array) -> jax.Array:
    """``rope_frequencies`` of dynamic scaling for the longest position of each row, float32
    [B, head_dim // 2]."""
    original = rope.original_max_positions
    length_B1 = jnp.maximum(jnp.max(position_ids_BT, axis=1, keepdims=True) + 1, original)
    stretch_B1 = rope.factor * length_B1.astype(jnp.float32) / original - (rope.factor - 1)
    theta_B1 = rope.theta * stretch_B1 ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / theta_B1 ** exponent[None, :]


def _yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
    """From 0, where the frequency stays, to 1, where it is divided by the factor: float32 [H/2]."""
    length = rope.original_max_positions

    def pair(turns: float) -> float:
        """The pair of features that turns so often in ``length`` positions."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.high_frequency_factor), pair(rope.low_frequency_factor)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = np.arange(head_dim // 2, dtype=np.float32)
    return np.clip((index - low) / (high - low or 0.001), 0, 1).astype(np.float32)


def rotary_tables(
    rope: Rope, head_dim: int, position_ids_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 [B, T, head_dim // 2], the second argument of ``rotate``."""
    if rope.scaling == "dynamic":
        frequency = dynamic_frequencies(rope, head_dim, position_ids_BT)
    else:
        frequency = jnp.asarray(rope_frequencies(rope, head_dim))[None, :]
    angle = position_ids_BT[:, :, None].astype(jnp.float32) * frequency[:, None, :]
    if rope.scaling != "yarn":
        return jnp.cos(angle), jnp.sin(angle)
    factor = rope.attention_factor or max(1.0, 0.1 * math.log(rope.factor) + 1.0)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def default_rotary(config: TextConfig, position_ids: jax.Array) -> Any:
    """``rotary_tables`` of the config's ``rope``, or None if it has none."""
    if config.rope is None:
        return None
    return rotary_tables(config.rope, config.head_width, position_ids)


def rotate(
    x_BTNH: jax.Array, rotary: tuple[jax.Array, jax.Array], *, interleaved: bool = False
) -> jax.Array:
    """Rotate features i and i + H/2 by the angle of their position, in float32.

    The pairing is that of GPT-NeoX and Hugging Face; the paper pairs adjacent features, 2i and 2i +
    1 (``interleaved``), which is a permutation of the head.
    """
    cos, sin = (table[:, :, None, :] for table in rotary)
    x_BTNH, dtype = x_BTNH.astype(jnp.float32), x_BTNH.dtype
    if interleaved:
        first, second = x_BTNH[..., ::2], x_BTNH[..., 1::2]
    else:
        first, second = jnp.split(x_BTNH, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return jnp.stack(turned, axis=-1).reshape(x_BTNH.shape).astype(dtype)
    return jnp.concatenate(turned, axis=-1).astype(dtype)
