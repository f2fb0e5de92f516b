"""A feed-forward layer over chunks of positions, to save memory.

The inner width of a feed-forward is several times the model's. Here one chunk of positions is
computed at a time, and recomputed in the backward pass (blockwise transformers, arXiv:2305.19370).
Weights that a mesh divides are gathered once for all chunks in each pass, and their gradients,
summed over chunks in float32, are reduced once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flax_transformers.models.kernels.local import on_each_device
from flax_transformers.parallel.matmul import einsum, rounded
from flax_transformers.parallel.partitioning import HIDDEN, gradient_dtype, mesh_axes_of, parts

Weights = dict[str, jax.Array]
"""Float32: ``up`` and perhaps ``gate`` [D, F], ``down`` [F, D], ``up_bias`` and ``gate_bias``."""

_AXES = {
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "up_bias": ("mlp",),
    "gate_bias": ("mlp",),
}


def can_be_chunked(x_BTD: jax.Array, chunk: int | None) -> bool:
    """Whether a device has more than ``chunk`` positions of a sequence, in whole chunks."""
    batch, length, _ = x_BTD.shape
    if chunk is None or batch % parts("batch") or length % parts("length"):
        return False
    own = length // parts("length")
    return own > chunk and own % chunk == 0


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_feed_forward(
    act: Callable[[jax.Array], jax.Array], chunk: int, x_BTD: jax.Array, weights: Weights
) -> jax.Array:
    """``down(act(up(x)))``, or gated, of [B, T, D] without the last bias, ``chunk`` positions of
    each sequence on a device at a time."""

    def local(x_BTD: jax.Array, weights: Weights) -> jax.Array:
        through = partial(_through, act, _whole(weights, x_BTD.dtype))
        y_BTD = jax.lax.map(through, _divided(x_BTD, chunk)).reshape(x_BTD.shape)
        return jax.lax.psum(y_BTD, mesh_axes_of("mlp"))

    return on_each_device(local, (x_BTD, weights), (HIDDEN, _axes(weights)), HIDDEN)


def _forward(
    act: Callable[[jax.Array], jax.Array], chunk: int, x_BTD: jax.Array, weights: Weights
) -> tuple[jax.Array, tuple[jax.Array, Weights]]:
    return chunked_feed_forward(act, chunk, x_BTD, weights), (x_BTD, weights)


def _backward(
    act: Callable[[jax.Array], jax.Array],
    chunk: int,
    operands: tuple[jax.Array, Weights],
    dy_BTD: jax.Array,
) -> tuple[jax.Array, Weights]:
    x_BTD, weights = operands

    def local(x_BTD: jax.Array, dy_BTD: jax.Array, weights: Weights) -> tuple[jax.Array, Weights]:
        whole = _whole(weights, x_BTD.dtype)

        def add(carry: tuple[Weights, jax.Array], of_chunk: Any) -> Any:
            (sums, x_or_dx), (i, dy_CD) = carry, of_chunk
            x_CD = jax.lax.dynamic_index_in_dim(x_or_dx, i, keepdims=False)
            _, derivatives = jax.vjp(partial(_through, act), whole, x_CD)
            found, dx_CD = derivatives(dy_CD)
            sums = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, found)
            return (sums, jax.lax.dynamic_update_index_in_dim(x_or_dx, dx_CD, i, 0)), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), whole)
        dy = _divided(dy_BTD.astype(x_BTD.dtype), chunk)
        # A chunk's gradient overwrites the chunk, which is not needed any more.
        start = zeros, _divided(x_BTD, chunk)
        (sums, dx), _ = jax.lax.scan(add, start, (jnp.arange(len(dy)), dy))
        reduced = {name: _reduced(name, total, x_BTD.dtype) for name, total in sums.items()}
        return jax.lax.psum(dx.reshape(x_BTD.shape), mesh_axes_of("mlp")), reduced

    axes = _axes(weights)
    return on_each_device(local, (x_BTD, dy_BTD, weights), (HIDDEN, HIDDEN, axes), (HIDDEN, axes))


chunked_feed_forward.defvjp(_forward, _backward)


def _axes(weights: Weights) -> dict[str, tuple[str, ...]]:
    return {name: _AXES[name] for name in weights}


def _through(act: Callable[[jax.Array], jax.Array], weights: Weights, x_CD: jax.Array) -> jax.Array:
    """One chunk through this device's part of the inner width."""

    def into(name: str) -> jax.Array:
        y_CF = einsum("CD,DF->CF", x_CD, weights[name])
        bias_F = weights.get(f"{name}_bias")
        return y_CF if bias_F is None else y_CF + bias_F[None]

    inner_CF = act(into("gate")) * into("up") if "gate" in weights else act(into("up"))
    return einsum("CF,FD->CD", inner_CF, weights["down"])


def _divided(x_BTD: jax.Array, chunk: int) -> jax.Array:
    """[B, T, D] to [chunks, B * chunk, D]: the same order in memory, so no copy."""
    batch, _, width = x_BTD.shape
    return x_BTD.reshape(-1, batch * chunk, width)


def _whole(weights: Weights, dtype: jnp.dtype) -> Weights:
    """Rounded, and gathered along "embed"."""

    def gather(name: str, weight: jax.Array) -> jax.Array:
        weight = rounded(weight, dtype)
        if "embed" not in _AXES[name] or not mesh_axes_of("embed"):
            return weight
        axis = _AXES[name].index("embed")
        return jax.lax.all_gather(weight, mesh_axes_of("embed"), axis=axis, tiled=True)

    return {name: gather(name, weight) for name, weight in weights.items()}


def _reduced(name: str, total: jax.Array, activations: jnp.dtype) -> jax.Array:
    """A gradient reduced over devices with other tokens, onto this device's part; float32."""
    total = total.astype(gradient_dtype(activations))
    embed = mesh_axes_of("embed") if "embed" in _AXES[name] else ()
    if embed:
        axis = _AXES[name].index("embed")
        # Along rows, for the reason that ``linear._scattered_gradient`` gives.
        rows = jnp.moveaxis(total, axis, 0)
        rows = jax.lax.psum_scatter(rows, embed, scatter_dimension=0, tiled=True)
        total = jnp.moveaxis(rows, 0, axis)
    others = (axis for axis in (*mesh_axes_of("batch"), *mesh_axes_of("length")))
    total = jax.lax.psum(total, tuple(axis for axis in others if axis not in embed))
    return total.astype(jnp.float32)
