"""Attention of a few new queries to a cache of keys and values."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from flax_transformers.models.kernels.closed_form import soft_capped
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.parallel.matmul import einsum
from flax_transformers.parallel.partitioning import SCORES, constrain

_FEW = 8
"""Up to so many queries, a CPU multiplies each by the cache on its own."""


def cached_attention(
    q_BTNH: jax.Array,
    cache: KeyValues,
    new: tuple[jax.Array, jax.Array] | None,
    index: jax.Array | None,
    *,
    mask: AttentionMask | None = None,
    bias: RelativePositionBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, KeyValues]:
    """``dispatch.dot_product_attention`` with the keys and values of a cache [B, K, S, H], in which
    ``new`` ones [B, T, K, H], if given, take the slots from ``index`` on; NaN if they do not fit.
    Returns [B, T, N, H] and the updated cache.

    The cache is read as it was: a loop can then update it in place, and copies nothing.
    """
    attended_BTNH, added = _attended(q_BTNH, cache, new, index, mask, bias, scale, softcap)
    if added is None or index is None:
        return attended_BTNH, cache
    first = _after(index, attended_BTNH)

    def write(slots_BKSH: jax.Array, new_BKTH: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(slots_BKSH, new_BKTH, first, axis=2)

    return attended_BTNH, jax.tree.map(write, cache, added)


def _attended(
    q_BTNH: jax.Array,
    cache: KeyValues,
    new: tuple[jax.Array, jax.Array] | None,
    index: jax.Array | None,
    mask: AttentionMask | None,
    bias: RelativePositionBias | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[jax.Array, KeyValues | None]:
    """The output, and the new keys and values as they go into the cache."""
    mask = AttentionMask() if mask is None else mask
    batch, queries, heads, width = q_BTNH.shape
    key_heads, slots = cache.keys.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(batch, queries, key_heads, -1, width), 1, 3)
    q_BKXH = q_BKGTH.reshape(batch, key_heads, -1, width)
    score = partial(_product, "BKXH,BKSH->BKXS", q_BKXH, dtype=jnp.dtype(jnp.float32))
    scores_BKXS = score(cache.keys)
    added = None
    if new is not None and index is not None:
        fits = index + queries <= slots
        added = jax.tree.map(
            lambda part: jnp.where(fits, part.astype(cache.keys.dtype), jnp.nan),
            KeyValues.of(*new),
        )
        scores_BKXS = _put(scores_BKXS, score(added.keys), index)
    scores_BNTS = constrain(scores_BKXS.reshape(batch, heads, queries, slots), SCORES) * scale
    if softcap is not None:
        scores_BNTS = soft_capped(scores_BNTS, softcap)
    if bias is not None:
        scores_BNTS += jnp.broadcast_to(bias.dense(mask, queries, slots), scores_BNTS.shape)
    allowed_BTS = mask.dense(queries, slots)
    if allowed_BTS is not None:
        lowest = jnp.finfo(jnp.float32).min
        scores_BNTS = jnp.where(allowed_BTS[:, None, :, :], scores_BNTS, lowest)
    share_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(cache.values.dtype)
    share_BKXS = share_BNTS.reshape(batch, key_heads, -1, slots)
    attend = partial(_product, "BKXS,BKSH->BKXH", dtype=cache.values.dtype)
    if added is None or index is None:
        attended_BKXH = attend(share_BKXS, cache.values)
    else:
        share_BKXT = jax.lax.dynamic_slice_in_dim(share_BKXS, index, queries, axis=3)
        before_BKXS = _put(share_BKXS, jnp.zeros_like(share_BKXT), index)
        attended_BKXH = attend(before_BKXS, cache.values) + attend(share_BKXT, added.values)
    return jnp.swapaxes(attended_BKXH.reshape(batch, heads, queries, -1), 1, 2), added


def _after(index: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
    """``index``, as a value that is known only once ``attended_BTNH`` is.

    XLA's CPU backend (jaxlib 0.10) updates an array in place only if all that reads it comes before
    by the flow of data, and copies it otherwise; it ignores optimisation barriers.
    """
    bits = jax.lax.bitcast_convert_type(attended_BTNH[0, 0, 0, 0].astype(jnp.float32), jnp.uint32)
    sign = jax.lax.shift_right_logical(bits, jnp.uint32(31))
    zero = jax.lax.shift_right_logical(sign, jnp.uint32(1))
    return index + zero.astype(jnp.int32)


def _put(whole_BKXS: jax.Array, part_BKXT: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole_BKXS, part_BKXT, index, axis=3)


def _product(spec: str, a_BKXY: jax.Array, b: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """``einsum`` of queries or probabilities with the cache."""

    def at_once(a_BKXY: jax.Array, b: jax.Array) -> jax.Array:
        return einsum(spec, a_BKXY, b, dtype)

    def apart(a_BKXY: jax.Array, b: jax.Array) -> jax.Array:
        # XLA's CPU backend multiplies matrices of few rows slowly, but single rows fast.
        rows = [einsum(spec, row, b, dtype) for row in jnp.split(a_BKXY, a_BKXY.shape[2], 2)]
        return jnp.concatenate(rows, axis=2)

    if not 1 < a_BKXY.shape[2] <= _FEW:
        return at_once(a_BKXY, b)
    return jax.lax.platform_dependent(a_BKXY, b, cpu=apart, default=at_once)
