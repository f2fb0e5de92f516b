"""Context of the tracing of a step: the division of axes, and the dtype of gradient reductions.

Modules and objectives use logical axes ("batch", "vocab"). The rules that map these to a mesh are
set by ``flax.linen.logical_axis_rules``, and the mesh by ``jax.set_mesh``; without them, nothing is
divided. ``rules.RULES`` lists the axes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import flax.linen as nn
import jax
import jax.numpy as jnp

HIDDEN = ("batch", "length", "features")
HEADS = ("batch", "length", "heads", "head_dim")
KEY_HEADS = ("batch", "length", "key_heads", "head_dim")
SCORES = ("batch", "heads", "length", None)
INTERMEDIATE = ("batch", "length", "mlp")
LOGITS = ("batch", "length", "vocab")

LANES = 128
"""Lanes of a TPU's registers and tiles: block sizes are multiples of it, and narrower shards are
padded."""

_gradient_dtype: ContextVar[str] = ContextVar("gradient_dtype", default="float32")


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrain the sharding of ``x`` to logical ``axes``, replicated along those that are None; a
    no-op without a mesh."""
    return nn.with_logical_constraint(x, axes)


def mesh_axes_of(name: str) -> tuple[str, ...]:
    """Axes of the current mesh that divide the logical axis ``name``, without those of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = dict(nn.get_logical_axis_rules()).get(name)
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def parts(name: str) -> int:
    """Number of parts that the logical axis ``name`` is divided into."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes_of(name))


def is_divided() -> bool:
    """Whether the current mesh divides anything: it has several devices."""
    return jax.sharding.get_abstract_mesh().size > 1


@contextlib.contextmanager
def gradients_reduced_in(dtype: str) -> Iterator[None]:
    """Set the dtype in which weight gradients of bfloat16 activations are computed and reduced."""
    token = _gradient_dtype.set(dtype)
    try:
        yield
    finally:
        _gradient_dtype.reset(token)


def gradient_dtype(activations: jnp.dtype) -> jnp.dtype:
    """Dtype of weight gradients for the dtype of activations, at least as wide."""
    return jnp.promote_types(_gradient_dtype.get(), activations)
