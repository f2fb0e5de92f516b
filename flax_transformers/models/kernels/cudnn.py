"""NVIDIA's flash attention (cuDNN), through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from flax_transformers.models.kernels.local import on_each_device
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.parallel.partitioning import HEADS, KEY_HEADS

WIDEST = 128
"""Largest head width that all GPUs since Ampere support."""
LEAST_CAPABILITY = 8.0
"""NVIDIA's compute capability of Ampere, the first GPUs that have the kernel."""


def is_named_mask(mask: AttentionMask) -> bool:
    """Whether cuDNN has an option for the mask: none, causal, or a causal window."""
    return not jax.tree.leaves(mask) and (mask.causal or mask.window is None)


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    scale: float,
) -> jax.Array:
    """``dot_product_attention`` of bfloat16 or float16, on each device separately.

    A mask that is not a named one is passed as bool [B, 1, T, S]. (JAX turns it into a bias, and
    before jax#39512 the backward pass computes an unused gradient of it, [B, N, T, S].)
    """
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    named = is_named_mask(mask)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
        allowed_BTS = None if named else mask.dense(q.shape[1], k.shape[1])
        if allowed_BTS is None:
            window = None if mask.window is None else (mask.window[0], 0)
            return attend(q, k, v, is_causal=mask.causal, local_window_size=window)
        shape = (len(q), 1, q.shape[1], k.shape[1])
        return attend(q, k, v, mask=jnp.broadcast_to(allowed_BTS[:, None], shape))

    of_mask = jax.tree.map(lambda _: ("batch", None), mask)
    axes = (HEADS, KEY_HEADS, KEY_HEADS, of_mask)
    attended_BTNH: jax.Array = on_each_device(local, (q_BTNH, k_BSKH, v_BSKH, mask), axes, HEADS)
    return attended_BTNH
