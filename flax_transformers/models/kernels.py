"""Attention itself, behind one signature."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.models.linear import einsum


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    *,
    mask_BTS: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (arXiv:1706.03762 §3.2.1), [B, T, N, H] in the dtype of ``q``.

    ``mask_BTS`` is True where a query may look at a key. Scores and softmax are float32. A masked
    key has probability exactly zero, so nothing in it can reach the output; a query that may look
    at nothing at all gets the plain mean of all values.
    """
    scores_BNTS = einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, jnp.float32)
    scores_BNTS *= q_BTNH.shape[-1] ** -0.5
    if mask_BTS is not None:
        lowest = jnp.finfo(jnp.float32).min
        scores_BNTS = jnp.where(mask_BTS[:, None, :, :], scores_BNTS, lowest)
    probabilities_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    if dropout_rate > 0.0 and dropout_key is not None:
        keep = 1.0 - dropout_rate
        kept_BNTS = jax.random.bernoulli(dropout_key, keep, probabilities_BNTS.shape)
        probabilities_BNTS = jnp.where(kept_BNTS, probabilities_BNTS / keep, 0.0)
    return einsum("BNTS,BSNH->BTNH", probabilities_BNTS.astype(v_BSNH.dtype), v_BSNH)
