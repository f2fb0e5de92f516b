"""Attention masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


def combined_segments(
    attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array | None:
    """Segments int32 [B, T] of an attention mask of ones and zeros, segments, or both."""
    if attention_mask is None or segment_ids is None:
        return attention_mask if segment_ids is None else segment_ids
    return jnp.where(attention_mask > 0, segment_ids, 0)


class AttentionMask(struct.PyTreeNode):
    """An attention mask in symbolic form: some kernels never need the array.

    A query attends to keys of its own segment. Padding is segment 0, so an attention mask of ones
    and zeros is the segments of a sequence with one example. ``causal``: no later keys. ``window``
    (left, right): no keys at larger distances. Both use positions if given, otherwise indices in
    the sequence. ``key_prefix``: keys that earlier queries of their segment attend to as well
    (prefix language models). ``allowed``: further restricts the keys of each query.

    Segments and positions are int32, [B, T] of queries and [B, S] of keys; ``key_prefix`` is bool
    [B, S], ``allowed`` bool [B, T, S].
    """

    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    key_prefix: jax.Array | None = None
    allowed: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def within(cls, segments_BT: jax.Array | None, *, causal: bool = False) -> AttentionMask:
        """Tokens attend to each other within their segments; None: all are in one segment."""
        return cls(segments_BT, segments_BT, causal=causal)

    @property
    def has_positions(self) -> bool:
        """Whether distances are between positions instead of indices."""
        return self.query_positions is not None or self.key_positions is not None

    def distance(self, queries: int, keys: int) -> jax.Array:
        """Position of the key less that of the query, int32 [B or 1, T, S]."""
        q, k = self.query_positions, self.key_positions
        q = jnp.arange(queries, dtype=jnp.int32)[None, :] if q is None else q
        k = jnp.arange(keys, dtype=jnp.int32)[None, :] if k is None else k
        return k[:, None, :] - q[:, :, None]

    def dense(self, queries: int, keys: int) -> jax.Array | None:
        """bool [B or 1, T, S], True where a query attends to a key; None if everywhere."""
        allowed = self.allowed
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            allowed = same if allowed is None else allowed & same
        if self.causal or self.window is not None:
            distance = self.distance(queries, keys)
            left, right = self.window or (None, None)

            def at_most(right: int) -> jax.Array:
                if self.key_prefix is None:
                    return distance <= right
                return (distance <= right) | self.key_prefix[:, None, :]

            for near in (
                at_most(0) if self.causal else None,
                distance >= -left if left is not None else None,
                at_most(right) if right is not None else None,
            ):
                if near is not None:
                    allowed = near if allowed is None else allowed & near
        return allowed
