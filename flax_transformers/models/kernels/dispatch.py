"""Dot-product attention by one of several kernels, behind one signature."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError
from flax_transformers.models.config import DropoutGenerator, Kernel
from flax_transformers.models.kernels.closed_form import soft_capped
from flax_transformers.models.kernels.cudnn import (
    LEAST_CAPABILITY,
    WIDEST,
    cudnn_attention,
    is_named_mask,
)
from flax_transformers.models.kernels.dropout import dropout, key_words
from flax_transformers.models.kernels.local import LANES
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.parallel.matmul import einsum
from flax_transformers.parallel.partitioning import SCORES, constrain, mesh_axes_of, parts

log = logging.getLogger(__name__)


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: AttentionMask | None = None,
    bias: jax.Array | RelativePositionBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_generator: DropoutGenerator = "auto",
    kernel: Kernel = "xla",
) -> jax.Array:
    """Scaled dot-product attention (arXiv:1706.03762 §3.2.1), [B, T, N, H] in the dtype of ``q``.

    K heads of keys and values serve N query heads in groups of adjacent heads. ``bias`` [B or 1, N,
    T, S], or one by distance, is added to the scores after ``scale``, by default ``H ** -0.5``, and
    after ``softcap``, which bounds them to c * tanh(score / c) (Gemma 2, arXiv:2408.00118).
    Scores and softmax are float32. A masked key has probability exactly zero, so it cannot affect
    the output. Raises UserError for calls that a ``kernel`` without "or xla" does not support.
    """
    mask = AttentionMask() if mask is None else mask
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    key = dropout_key if dropout_rate > 0.0 else None
    obstacle = None
    if kernel.startswith("splash"):
        obstacle = _splash_cannot(q_BTNH, k_BSKH, mask, bias)
        if key is not None and obstacle is None:
            obstacle = _splash_cannot_drop(q_BTNH, k_BSKH, mask, dropout_generator)
        if softcap is not None and (key is not None or bias is not None):
            obstacle = obstacle or "bound scores with dropout or a bias"
    elif kernel.startswith("cudnn"):
        obstacle = _cudnn_cannot(q_BTNH, k_BSKH, mask, bias, dropping=key is not None)
        obstacle = obstacle or (None if softcap is None else "bound scores")
    if kernel.startswith(("splash", "cudnn")) and v_BSKH.shape[-1] != k_BSKH.shape[-1]:
        obstacle = "use values of another width than the keys"
    chosen = _chosen(kernel, obstacle, "" if key is None else ", with dropout inside the kernel")
    if chosen == "cudnn":
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    if chosen == "splash":
        # Imported here, as Pallas takes long to import.
        from flax_transformers.models.kernels.flash_attention import Masks, flash_attention
        from flax_transformers.models.kernels.splash import splash_attention

        if bias is None and key is None:
            return splash_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap)
        assert bias is None or isinstance(bias, RelativePositionBias)  # see _splash_cannot
        masks = None if key is None else Masks(dropout_rate, key_words(key))
        return flash_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale, bias, masks)
    if isinstance(bias, RelativePositionBias):
        bias = bias.dense(mask, q_BTNH.shape[1], k_BSKH.shape[1])
    drop = None
    if key is not None:
        drop = partial(dropout, rate=dropout_rate, key=key, generator=dropout_generator)
    return _xla_attention(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, softcap, drop)


def probabilities_of_keys(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    mask: AttentionMask | None = None,
    bias: jax.Array | RelativePositionBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The probabilities that ``dot_product_attention`` computes without dropout, float32 [B, N, T,
    S]."""
    mask = AttentionMask() if mask is None else mask
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(bias, RelativePositionBias):
        bias = bias.dense(mask, q_BTNH.shape[1], k_BSKH.shape[1])
    q_BNTH, k_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH))
    return _xla_probabilities(q_BNTH, k_BKSH, mask, bias, scale, softcap)


_DROPPING = "apply model.attention_dropout"


def _splash_cannot(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask: AttentionMask,
    bias: jax.Array | RelativePositionBias | None,
) -> str | None:
    """What the TPU kernels do not support in a call, or None."""
    queries, heads = q_BTNH.shape[1:3]
    keys, key_heads = k_BSKH.shape[1:3]
    if mask.has_positions:
        return "mask by position_ids"
    if mask.key_prefix is not None:
        return "use a prefix mask"
    if min(queries, keys) < LANES * parts("length"):
        return f"divide {min(queries, keys)} positions into blocks of {LANES} on each device"
    if bias is not None:
        if not isinstance(bias, RelativePositionBias):
            return "use a bias other than by distance"
        if queries != keys or key_heads != heads or mask.window is not None:
            return "use a relative bias with cross-attention, grouped heads or windows"
    return _mesh_cannot(q_BTNH, k_BSKH)


def _splash_cannot_drop(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask, generator: DropoutGenerator
) -> str | None:
    """What the TPU kernel with dropout does not support in a call, or None."""
    if generator == "threefry":
        return f"{_DROPPING} with compute.dropout_generator threefry"
    if k_BSKH.shape[2] != q_BTNH.shape[2] or mask.window is not None:
        return f"{_DROPPING} with grouped heads or windows"
    return None


def _cudnn_cannot(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask: AttentionMask,
    bias: jax.Array | RelativePositionBias | None,
    *,
    dropping: bool,
) -> str | None:
    """What NVIDIA's kernel does not support in a call, or None."""
    width, lengths = q_BTNH.shape[3], (q_BTNH.shape[1], k_BSKH.shape[1])
    if dropping:
        return _DROPPING
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"compute in {q_BTNH.dtype}"
    if width % 8 or width > WIDEST:
        return f"use heads of width {width}, which is not a multiple of 8 up to {WIDEST}"
    if bias is not None:
        return "compute the gradient of a bias correctly (jax#30593)"
    if parts("length") > 1:
        return "divide the sequence length over the mesh"
    if not is_named_mask(mask) and any(length % 2 for length in lengths):
        return f"mask sequences of odd lengths, {lengths[0]} and {lengths[1]}"
    return _mesh_cannot(q_BTNH, k_BSKH) or _gpu_cannot()


def _gpu_cannot() -> str | None:
    """Why NVIDIA's kernel does not run on this machine's GPUs, or None, as where there are none."""
    if jax.default_backend() != "gpu":
        return None
    gpu = jax.local_devices()[0]
    try:
        capability = float(gpu.compute_capability)
    except (AttributeError, ValueError):  # of AMD's GPUs it is a name, as "gfx942"
        capability = 0.0
    if capability >= LEAST_CAPABILITY:
        return None
    return f"run on {gpu.device_kind}, without NVIDIA's compute capability {LEAST_CAPABILITY}"


def _mesh_cannot(q_BTNH: jax.Array, k_BSKH: jax.Array) -> str | None:
    """What the current mesh cannot divide over devices in a call, or None."""
    sizes = {"batch": q_BTNH.shape[0], "heads": q_BTNH.shape[2], "key_heads": k_BSKH.shape[2]}
    for name, size in sizes.items():
        if size % parts(name):
            return f"divide {size} {name} over a mesh axis of {parts(name)}"
    if mesh_axes_of("heads") != mesh_axes_of("key_heads"):
        return "keep query heads with their key heads, which the mesh divides differently"
    return None


def _chosen(kernel: Kernel, obstacle: str | None, how: str) -> str:
    """The kernel of a call; ``obstacle`` is what the first choice does not support, and ``how`` it
    is run otherwise is for the log."""
    if kernel == "auto":  # nothing was chosen
        return "xla"
    first, _, otherwise = kernel.partition(" or ")
    if obstacle is None:
        if first != "xla":  # plain operations are no news
            _say(f"attention: {first}{how}")
        return first
    if not otherwise:
        raise UserError(
            f"attention kernel {first} cannot {obstacle}; set compute.attention to auto"
        )
    _say(f"attention: {otherwise}, because {first} cannot {obstacle}")
    return otherwise


@functools.cache
def _say(message: str) -> None:
    """Log the choice once, not for every layer."""
    log.info(message)


def _xla_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    bias: jax.Array | None,
    scale: float,
    softcap: float | None,
    drop: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """Plain operations, with ``drop`` on the probabilities; a query without any key gets the mean
    of all values."""
    batch, queries, heads = q_BTNH.shape[:3]
    keys, key_heads = k_BSKH.shape[1:3]
    # Heads first, once: else the CPU backend transposes the operands of each of six products.
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    probabilities_BNTS = _xla_probabilities(q_BNTH, k_BKSH, mask, bias, scale, softcap)
    if drop is not None:
        probabilities_BNTS = drop(probabilities_BNTS)
    probabilities_BNTS = probabilities_BNTS.astype(v_BSKH.dtype)
    if key_heads < heads:
        probabilities_BKGTS = probabilities_BNTS.reshape(batch, key_heads, -1, queries, keys)
        attended_BKGTH = einsum("BKGTS,BKSH->BKGTH", probabilities_BKGTS, v_BKSH)
        return attended_BKGTH.reshape(batch, heads, queries, -1).swapaxes(1, 2)
    return einsum("BNTS,BNSH->BNTH", probabilities_BNTS, v_BKSH).swapaxes(1, 2)


def _xla_probabilities(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    mask: AttentionMask,
    bias: jax.Array | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """The softmax of the scores, float32 [B, N, T, S]."""
    batch, heads, queries, width = q_BNTH.shape
    key_heads, keys = k_BKSH.shape[1:3]
    if key_heads < heads:  # group the queries: repeating the keys would copy a whole cache
        q_BKGTH = q_BNTH.reshape(batch, key_heads, -1, queries, width)
        scores_BNTS = einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, jnp.float32)
        scores_BNTS = scores_BNTS.reshape(batch, heads, queries, keys)
    else:
        scores_BNTS = einsum("BNTH,BNSH->BNTS", q_BNTH, k_BKSH, jnp.float32)
    # Divided by queries: where a mesh divides the length, keys and values are gathered over it.
    scores_BNTS = constrain(scores_BNTS, SCORES) * scale
    if softcap is not None:
        scores_BNTS = soft_capped(scores_BNTS, softcap)
    if bias is not None:
        scores_BNTS += jnp.broadcast_to(bias, scores_BNTS.shape)
    allowed_BTS = mask.dense(queries, keys)
    if allowed_BTS is not None:
        lowest = jnp.finfo(jnp.float32).min
        scores_BNTS = jnp.where(allowed_BTS[:, None, :, :], scores_BNTS, lowest)
    return jax.nn.softmax(scores_BNTS, axis=-1)
