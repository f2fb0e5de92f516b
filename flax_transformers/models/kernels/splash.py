"""Splash attention: JAX's flash attention for TPUs, which skips blocks that are masked out.

Scores are computed, and recomputed in the backward pass, a block at a time (FlashAttention,
arXiv:2205.14135). Over a mesh whose axes divide the length, each device keeps its queries and
all-gathers the keys and values of its sequences (as Llama 3 does, arXiv:2407.21783 §3.3.2). Under a
causal mask the devices with the last queries have the most work.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from flax_transformers.models.kernels.local import (
    ATTENDED,
    SEGMENTS,
    block_size,
    gathered,
    gathering,
    on_cpu,
    on_each_device,
    padded_to_lanes,
)
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.parallel.partitioning import HEADS, KEY_HEADS, mesh_axes_of, parts

LARGEST_BLOCK = 512


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """``dot_product_attention`` for masks by index in the sequence; heads may be grouped.

    A query without any key gets an undefined result and wrong gradients, so its output must not
    affect the loss.
    """
    length = q_BTNH.shape[1]
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BTNH, k_BSKH, v_BSKH, segments = padded_to_lanes(q_BTNH, k_BSKH, v_BSKH, mask)
    heads = q_BTNH.shape[2] // parts("heads")
    kernel = _kernel(mask, q_BTNH.shape[1], k_BSKH.shape[1], heads, softcap)
    attended_BTNH = on_each_device(
        gathering(_attend),
        (kernel, q_BTNH, k_BSKH, v_BSKH, segments),
        (_divided(kernel, mask), HEADS, KEY_HEADS, KEY_HEADS, segments and SEGMENTS),
        HEADS,
    )
    return attended_BTNH[:, :length]


def _attend(
    kernel: splash.SplashAttentionKernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.swapaxes(x, 1, 2) for x in (q_BTNH, gathered(k_BSKH), gathered(v_BSKH))
    )
    of_row = None if segments is None else splash.SegmentIds(*segments)
    return jnp.swapaxes(_by_sequence(kernel, q_BNTH, k_BKSH, v_BKSH, of_row), 1, 2)


@jax.custom_vjp
def _by_sequence(
    kernel: splash.SplashAttentionKernel,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: splash.SegmentIds | None,
) -> jax.Array:
    """``kernel`` on each sequence."""
    attend: Any = jax.vmap(kernel)  # its type promises more results
    return attend(q_BNTH, k_BKSH, v_BKSH, segments)


def _by_sequence_forward(
    kernel: splash.SplashAttentionKernel,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: splash.SegmentIds | None,
) -> tuple[jax.Array, Any]:
    attend: Any = jax.vmap(kernel)
    kept = jax.vjp(lambda *operands: attend(*operands, segments), q_BNTH, k_BKSH, v_BKSH)
    # The kernel writes each query's normaliser 128 times. Without the barrier all copies stay in
    # memory until the backward pass.
    return jax.lax.optimization_barrier(kept)


def _by_sequence_backward(derivatives: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    return None, *derivatives(cotangent), None


_by_sequence.defvjp(_by_sequence_forward, _by_sequence_backward)


def _kernel(
    mask: AttentionMask, queries: int, keys: int, heads: int, softcap: float | None
) -> splash.SplashAttentionKernel:
    """The kernel of a device with ``heads`` heads and its part of the queries."""
    block_q = block_size(queries // parts("length"), LARGEST_BLOCK)
    block_k = block_size(keys, LARGEST_BLOCK)
    shards = _shards(mask)
    of_head = _mask((queries * shards // parts("length"), keys), mask)
    return splash.make_splash_mha(
        masks.MultiHeadMask([of_head] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENDED,
        interpret=on_cpu(),
    )


def _shards(mask: AttentionMask) -> int:
    """Number of parts of the length with different masks."""
    return parts("length") if mask.causal or mask.window is not None else 1


def _mask(shape: tuple[int, int], mask: AttentionMask) -> masks.Mask:
    """The part of the mask that does not depend on data."""
    if mask.window is None:
        return masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    left, right = mask.window
    return masks.LocalMask(shape, (left, min(right, 0) if mask.causal else right), offset=0)


def _divided(
    kernel: splash.SplashAttentionKernel, mask: AttentionMask
) -> splash.SplashAttentionKernel | None:
    """The sharding of the kernel's mask."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    spec = PartitionSpec(None, mesh_axes_of("length") if _shards(mask) > 1 else None)
    return kernel.manual_sharding_spec(NamedSharding(mesh, spec))
