"""What is in force while a step is traced: how axes are divided, and what gradients cross the wire.

Modules and objectives name axes by what they mean ("batch", "vocab"). The rules that map these to a
mesh come from outside (``flax.linen.logical_axis_rules``), and so does the mesh
(``jax.set_mesh``); without them nothing is divided.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import flax.linen as nn
import jax
import jax.numpy as jnp

_gradient_dtype: ContextVar[str] = ContextVar("gradient_dtype", default="float32")


def mesh_axes_of(name: str) -> tuple[str, ...]:
    """The axes of the mesh in force that the logical axis ``name`` is divided over, none or more,
    those of size one left out."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = dict(nn.get_logical_axis_rules()).get(name)
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def parts(name: str) -> int:
    """Into how many parts the logical axis ``name`` is divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes_of(name))


@contextlib.contextmanager
def gradients_reduced_in(dtype: str) -> Iterator[None]:
    """Within it, gradients of weights that are made of bfloat16 activations leave their product,
    and cross the mesh, in ``dtype``."""
    token = _gradient_dtype.set(dtype)
    try:
        yield
    finally:
        _gradient_dtype.reset(token)


def gradient_dtype(activations: jnp.dtype) -> jnp.dtype:
    """That of a weight's gradient made of ``activations``: never less than these."""
    return jnp.promote_types(_gradient_dtype.get(), activations)
