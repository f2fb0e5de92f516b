"""NVIDIA's flash attention (cuDNN), by JAX's public function for it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from flax_transformers.models.kernels.local import on_each_device
from flax_transformers.models.layers.masks import AttentionMask
from flax_transformers.models.layers.sharding import HEADS, KEY_HEADS

WIDEST = 128
"""The widest heads that all GPUs since Ampere take."""


def goes_by_form_alone(mask: AttentionMask) -> bool:
    """Whether cuDNN knows the mask by name: none, causal, or a causal window."""
    return not jax.tree.leaves(mask) and (mask.causal or mask.window is None)


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    scale: float,
) -> jax.Array:
    """``dot_product_attention`` of bfloat16 or float16, on each device by itself.

    What it is sent besides is the form of the mask, where that is all there is, and else the mask
    written out for all heads at once, bool [B, 1, T, S]. (JAX makes a bias of that, and until its
    #39512 the backward pass writes out a gradient of it which nobody wants, [B, N, T, S].)
    """
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    by_form = goes_by_form_alone(mask)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
        allowed_BTS = None if by_form else mask.dense(q.shape[1], k.shape[1])
        if allowed_BTS is None:
            window = None if mask.window is None else (mask.window[0], 0)
            return attend(q, k, v, is_causal=mask.causal, local_window_size=window)
        shape = (len(q), 1, q.shape[1], k.shape[1])
        return attend(q, k, v, mask=jnp.broadcast_to(allowed_BTS[:, None], shape))

    of_mask = jax.tree.map(lambda _: ("batch", None), mask)
    axes = (HEADS, KEY_HEADS, KEY_HEADS, of_mask)
    attended_BTNH: jax.Array = on_each_device(local, (q_BTNH, k_BSKH, v_BSKH, mask), axes, HEADS)
    return attended_BTNH
