"""Where a token stands: position numbers and rotary positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers import ranges
from flax_transformers.ranges import Ranges


def positions_from_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Position within its own segment, int32 [B, T]: counting restarts where it changes."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)
    start_index_BT = jnp.where(starts_BT, index_T[None, :], 0)
    return index_T[None, :] - jax.lax.cummax(start_index_BT, axis=1)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (RoFormer, arXiv:2104.09864), and how they reach longer texts.

    ``linear`` divides positions by ``factor`` (arXiv:2306.15595). ``llama3`` divides only the slow
    frequencies, with a ramp between two wavelengths (Llama 3.1, arXiv:2407.21783), which it counts
    in ``original_max_positions``.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192

    RANGES: ClassVar[Ranges] = {
        "theta": ranges.numbers(1, 1e12),
        "factor": ranges.numbers(0, 1e6, above=True),
        "low_frequency_factor": ranges.numbers(0, 1e6, above=True),
        "high_frequency_factor": ranges.numbers(0, 1e6, above=True),
        "original_max_positions": ranges.POSITIONS,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model.rope")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position for each pair of a head's features, float32 [head_dim // 2]."""
        # In float32 like the originals: the last bit counts at position 100,000.
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequency = np.float32(1) / np.float32(self.theta) ** exponent
        if self.scaling == "linear":
            return frequency / np.float32(self.factor)
        if self.scaling == "llama3":
            wavelength = 2 * math.pi / frequency
            fast = self.original_max_positions / self.high_frequency_factor
            slow = self.original_max_positions / self.low_frequency_factor
            turns = self.original_max_positions / wavelength
            spread = self.high_frequency_factor - self.low_frequency_factor
            ramp = (turns - self.low_frequency_factor) / spread
            mixed = (1 - ramp) * frequency / self.factor + ramp * frequency
            scaled = np.where(wavelength > slow, frequency / self.factor, mixed)
            return np.where(wavelength < fast, frequency, scaled).astype(np.float32)
        return frequency


def rotary_tables(
    rope: Rope, head_dim: int, position_ids_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 [B, T, head_dim // 2] that ``rotate`` turns queries and keys by."""
    frequency = jnp.asarray(rope.frequencies(head_dim))
    angle = position_ids_BT[:, :, None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns feature i with feature i + H/2 by the angle of its position, in float32.

    The pairing is that of GPT-NeoX and Hugging Face; the paper pairs neighbours, which is a
    permutation of the head.
    """
    cos, sin = (table[:, :, None, :] for table in rotary)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
