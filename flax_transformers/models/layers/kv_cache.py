"""What a decoder remembers between calls: explicit, a pytree in and a pytree out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.errors import UserError
from flax_transformers.models.layers.attention import KeyValues
from flax_transformers.models.layers.block import LayerCache, LayerInputs
from flax_transformers.models.layers.masks import AttentionMask

if TYPE_CHECKING:
    from flax_transformers.models.config import TransformerConfig


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens so far, in S slots that are filled in the order of calls.

    ``layers`` holds arrays [num_layers, B, S, K, H]. ``segments`` and ``positions`` int32 [B, S]
    say what stands in each slot (segment 0: padding, or nothing yet). ``index``: slots filled, an
    int32 scalar. ``context_segments`` int32 [B, C]: which places of the context are tokens.
    """

    layers: LayerCache
    segments: jax.Array
    positions: jax.Array
    index: jax.Array
    context_segments: jax.Array | None = None


def empty_cache(
    config: TransformerConfig, num_layers: int, batch: int, slots: int, dtype: jnp.dtype
) -> Cache:
    """A cache for ``batch`` rows of at most ``slots`` tokens each."""
    shape = (num_layers, batch, slots, config.kv_heads, config.head_width)
    nothing = jnp.zeros((batch, slots), jnp.int32)
    return Cache(
        layers=LayerCache(KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))),
        segments=nothing,
        positions=nothing,
        index=jnp.zeros((), jnp.int32),
    )


def causal_inputs(
    segment_ids: jax.Array | None,
    position_ids: jax.Array | None,
    shape: tuple[int, ...],
    cache: Cache | None,
    prefix_mask: jax.Array | None = None,
) -> tuple[LayerInputs, Cache | None]:
    """What layers of a causal stack need for ``shape`` (B, T) new tokens, with or without a cache.

    With one, the tokens take the next T slots and see what is in the slots before; it comes back
    with all but its layers renewed. Tokens that its slots have no room for make all that follows
    NaN, or raise UserError if they never had. ``position_ids`` matter to the mask where they are
    given. ``prefix_mask`` [B, T] is 1 at new tokens that those before them in their segment see as
    well.
    """
    prefix = None if prefix_mask is None else prefix_mask > 0
    if cache is None:
        mask = AttentionMask(
            segment_ids, segment_ids, position_ids, position_ids, prefix, causal=True
        )
        return LayerInputs(mask=mask), None
    if shape[1] > cache.segments.shape[1]:
        raise UserError(
            f"{shape[1]} tokens do not fit into a cache of {cache.segments.shape[1]} slots; make "
            "it with empty_cache(batch, slots) for all tokens there will be"
        )
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    positions = next_positions(shape, cache) if position_ids is None else position_ids

    def write(slots: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), cache.index, 1)

    renewed = cache.replace(
        segments=write(cache.segments, segments),
        positions=write(cache.positions, positions),
        index=cache.index + shape[1],
    )
    if prefix is not None:
        prefix = write(jnp.zeros(cache.segments.shape, bool), prefix)
    mask = AttentionMask(
        segments, renewed.segments, positions, renewed.positions, prefix, causal=True
    )
    return LayerInputs(mask=mask, index=cache.index), renewed


def next_positions(shape: tuple[int, ...], cache: Cache) -> jax.Array:
    """Positions int32 [B, T] that go on counting slots."""
    return jnp.broadcast_to(cache.index + jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
