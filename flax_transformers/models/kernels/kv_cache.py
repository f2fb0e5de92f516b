"""Keys and values that a decoder keeps between calls: an explicit pytree, in and out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.errors import UserError
from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.kernels.masks import AttentionMask


class KeyValues(struct.PyTreeNode):
    """Keys (after rotation) and values [B, K, S, H] for later queries."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, k_BSKH: jax.Array, v_BSKH: jax.Array) -> KeyValues:
        """Of keys and values in the order of their computation."""
        return cls(jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2))


class LayerCache(struct.PyTreeNode):
    """Cached keys and values of one layer; ``cross`` are those of the context, if any."""

    own: KeyValues
    cross: KeyValues | None = None


class Cache(struct.PyTreeNode):
    """Keys and values of all tokens so far, in S slots that calls fill in order.

    ``layers`` has arrays [num_layers, B, K, S, H]. ``segments`` and ``positions`` int32 [B, S]
    describe the token in each slot (segment 0: padding or empty). ``index``: number of slots in
    use, an int32 scalar. ``context_segments`` int32 [B, C]: 0 at padding of the context.

    ``empty``: no slot is in use, so that the next call attends to its own tokens alone.
    ``visible`` bool [B, T, S] restricts the slots that the T tokens of the next call attend to, its
    own slots included; the cache that the call returns has None. With it, continuations of a
    sequence can share the slots of what they have in common.
    """

    layers: LayerCache
    segments: jax.Array
    positions: jax.Array
    index: jax.Array
    context_segments: jax.Array | None = None
    visible: jax.Array | None = None
    empty: bool = struct.field(pytree_node=False, default=False)

    @property
    def layers_in_use(self) -> LayerCache | None:
        """What layers attend to; None if it is empty."""
        return None if self.empty else self.layers

    def after_call(self, updated: Cache, layers: LayerCache | None) -> Cache:
        """``updated`` by ``causal_mask``, with the ``layers`` that a call returned: of a cache that
        was empty, only the first slots."""
        if self.empty and layers is not None:
            start = jnp.zeros((), jnp.int32)
            own = jax.tree.map(
                lambda slots, new: jax.lax.dynamic_update_slice_in_dim(
                    slots, new.astype(slots.dtype), start, axis=slots.ndim - 2
                ),
                self.layers.own,
                layers.own,
            )
            layers = LayerCache(own, layers.cross)
        return updated.replace(layers=layers)


def empty_cache(config: TransformerConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache for ``batch`` sequences of at most ``slots`` tokens each."""
    shape = (config.num_layers, batch, config.kv_heads, slots)
    keys = jnp.zeros((*shape, config.head_width), dtype)
    values = jnp.zeros((*shape, config.value_width), dtype)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(
        layers=LayerCache(KeyValues(keys, values)),
        segments=empty,
        positions=empty,
        index=jnp.zeros((), jnp.int32),
        empty=True,
    )


def causal_mask(
    segment_ids: jax.Array | None,
    position_ids: jax.Array | None,
    shape: tuple[int, ...],
    cache: Cache | None,
    prefix_mask: jax.Array | None = None,
) -> tuple[AttentionMask, Cache | None]:
    """The mask of a causal stack for ``shape`` (B, T) new tokens, and the updated cache.

    With a ``cache``, the new tokens take the next T slots and attend to the slots before; the
    result has all fields updated but ``layers``. Tokens beyond the last slot make all later outputs
    NaN, and raise UserError if T alone exceeds the number of slots. ``position_ids`` affect the
    mask only where they are given. ``prefix_mask`` [B, T] is 1 at new tokens that earlier tokens of
    their segment attend to as well.
    """
    prefix = None if prefix_mask is None else prefix_mask > 0
    if cache is None:
        return (
            AttentionMask(
                segment_ids, segment_ids, position_ids, position_ids, prefix, causal=True
            ),
            None,
        )
    if shape[1] > cache.segments.shape[1]:
        raise UserError(
            f"{shape[1]} tokens do not fit into a cache of {cache.segments.shape[1]} slots; create "
            "it with empty_cache(batch, slots), slots being the number of all tokens"
        )
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    positions = next_positions(shape, cache) if position_ids is None else position_ids

    def write(slots: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), cache.index, 1)

    updated = cache.replace(
        segments=write(cache.segments, segments),
        positions=write(cache.positions, positions),
        index=cache.index + shape[1],
        visible=None,
        empty=False,
    )
    if cache.empty:
        return AttentionMask(segments, segments, positions, positions, prefix, causal=True), updated
    if prefix is not None:
        prefix = write(jnp.zeros(cache.segments.shape, bool), prefix)
    mask = AttentionMask(
        segments,
        updated.segments,
        positions,
        updated.positions,
        prefix,
        cache.visible,
        causal=True,
    )
    return mask, updated


def next_positions(shape: tuple[int, ...], cache: Cache) -> jax.Array:
    """Position ids int32 [B, T] of the next slots."""
    return jnp.broadcast_to(cache.index + jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
