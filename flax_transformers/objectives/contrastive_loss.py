"""Losses over all pairs of a batch of images and a batch of texts, divided over a mesh.

Embeddings are float32 [B, E] of length one; ``weight_B`` float32 is 1 at pairs and 0 at padding,
which is no negative either. I and J stand for B, as rows and as columns.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_transformers.parallel.partitioning import constrain, mesh_axes_of, parts

MAX_SCALE = 100.0  # arXiv:2103.00020 section 2.5

Sums = tuple[jax.Array, jax.Array]
"""The loss of all pairs, and the number of images whose own text is the most similar."""

_cosines = partial(jnp.einsum, "IE,JE->IJ", precision="highest")


@jax.custom_vjp
def clipped_scale(log_scale: jax.Array) -> jax.Array:
    """``exp(log_scale)``, at most ``MAX_SCALE``. Above it, only gradients that lower the scale
    pass, so that it returns."""
    return jnp.exp(jnp.minimum(log_scale, math.log(MAX_SCALE)))


def _clipped_forward(log_scale: jax.Array) -> tuple[jax.Array, Sums]:
    scale = clipped_scale(log_scale)
    return scale, (scale, log_scale > math.log(MAX_SCALE))


def _clipped_backward(kept: Sums, cotangent: jax.Array) -> tuple[jax.Array]:
    scale, above = kept
    return (jnp.where(above & (cotangent < 0), 0.0, scale * cotangent),)


clipped_scale.defvjp(_clipped_forward, _clipped_backward)


def softmax_loss(
    image_BE: jax.Array, text_BE: jax.Array, weight_B: jax.Array, scale: jax.Array
) -> Sums:
    """The mean of both cross-entropies, of the texts for each image and the reverse (CLIP).

    Each device has its rows of the [B, B] logits, and gathers the embeddings of the other side.
    """
    loss, correct = _one_way(image_BE, text_BE, weight_B, scale)
    return (loss + _one_way(text_BE, image_BE, weight_B, scale)[0]) / 2, correct


def _one_way(query_IE: jax.Array, key_JE: jax.Array, weight_B: jax.Array, scale: jax.Array) -> Sums:
    key_JE, real_J = constrain(key_JE, (None, None)), constrain(weight_B, (None,)) > 0
    logits_IJ = constrain(scale * _cosines(query_IE, key_JE), ("batch", None))
    logits_IJ = jnp.where(real_J[None], logits_IJ, jnp.finfo(jnp.float32).min)
    own_I1 = jnp.take_along_axis(logits_IJ, jnp.arange(len(query_IE))[:, None], axis=1)
    total_I = jax.nn.logsumexp(logits_IJ, axis=1)
    correct_I = jnp.sum(logits_IJ >= own_I1, axis=1) == 1  # a tie is not correct
    return jnp.sum((total_I - own_I1[:, 0]) * weight_B), jnp.sum(correct_I * weight_B)


@jax.custom_vjp
def sigmoid_loss(
    image_BE: jax.Array, text_BE: jax.Array, weight_B: jax.Array, scale: jax.Array, bias: jax.Array
) -> Sums:
    """The binary cross-entropies of all pairs: an image and its own text, or not (SigLIP).

    The texts pass around the ring of devices, each of which has the logits of its own images and
    one device's texts at a time (arXiv:2303.15343 section 3.3). The gradient is computed on the
    same way, so that nothing is kept of any step but sums.
    """
    return _around_the_ring(image_BE, text_BE, weight_B, scale, bias)[0]


def _sigmoid_forward(*operands: jax.Array) -> tuple[Sums, tuple[jax.Array, ...]]:
    return _around_the_ring(*operands)


def _sigmoid_backward(gradients: tuple[jax.Array, ...], cotangent: Sums) -> tuple[Any, ...]:
    image_BE, text_BE, weight_B, scale, bias = (cotangent[0] * each for each in gradients)
    return image_BE, text_BE, weight_B, scale, bias


sigmoid_loss.defvjp(_sigmoid_forward, _sigmoid_backward)


def _around_the_ring(*operands: jax.Array) -> tuple[Sums, tuple[jax.Array, ...]]:
    """The sums, and the gradient of the loss in each operand (zero for the weights)."""
    axes = mesh_axes_of("batch")
    if not axes:
        return _ring((), 1, *operands)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        partial(_ring, axes, parts("batch")),
        in_specs=(rows, rows, rows, whole, whole),
        out_specs=((whole, whole), (rows, rows, rows, whole, whole)),
        check_vma=False,
    )(*operands)


def _ring(
    axes: tuple[str, ...],
    devices: int,
    image_IE: jax.Array,
    text_JE: jax.Array,
    weight_I: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[Sums, tuple[jax.Array, ...]]:
    own_IJ = jnp.eye(len(image_IE), dtype=bool)
    own_I = scale * jnp.sum(image_IE * text_JE, axis=1) + bias

    def rotate(x: jax.Array) -> jax.Array:
        ring = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.lax.ppermute(x, axes, ring) if axes else x

    def visit(carry: Any, step: jax.Array) -> tuple[Any, None]:
        text_JE, weight_J, of_text_JE, of_image_IE, sums, most_I = carry
        cosine_IJ = _cosines(image_IE, text_JE)
        pair_IJ = own_IJ & (step == 0)
        sign_IJ = jnp.where(pair_IJ, 1.0, -1.0)
        logits_IJ, weight_IJ = scale * cosine_IJ + bias, weight_I[:, None] * weight_J[None]
        loss = -jnp.sum(weight_IJ * jax.nn.log_sigmoid(sign_IJ * logits_IJ))
        slope_IJ = -weight_IJ * sign_IJ * jax.nn.sigmoid(-sign_IJ * logits_IJ)
        of_image_IE += scale * jnp.einsum("IJ,JE->IE", slope_IJ, text_JE, precision="highest")
        of_text_JE += scale * jnp.einsum("IJ,IE->JE", slope_IJ, image_IE, precision="highest")
        sums += jnp.stack([loss, jnp.sum(slope_IJ * cosine_IJ), jnp.sum(slope_IJ)])
        other_IJ = jnp.where(pair_IJ | (weight_J[None] == 0), -jnp.inf, logits_IJ)
        most_I = jnp.maximum(most_I, jnp.max(other_IJ, axis=1))
        moved = map(rotate, (text_JE, weight_J, of_text_JE))
        return (*moved, of_image_IE, sums, most_I), None

    zeros = (jnp.zeros_like(text_JE), jnp.zeros_like(image_IE), jnp.zeros(3))
    start = (text_JE, weight_I, *zeros, jnp.full_like(own_I, -jnp.inf))
    end, _ = jax.lax.scan(visit, start, jnp.arange(devices))
    _, _, of_text_JE, of_image_IE, sums, most_I = end
    correct = jnp.sum((most_I < own_I) * weight_I)
    sums = jnp.append(sums, correct)
    loss, of_scale, of_bias, correct = jax.lax.psum(sums, axes) if axes else sums
    gradients = (of_image_IE, of_text_JE, jnp.zeros_like(weight_I), of_scale, of_bias)
    return (loss, correct), gradients
