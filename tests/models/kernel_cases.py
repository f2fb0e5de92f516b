"""Operands for kernels, and their outputs and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.testing import relative_difference


def draw(length, heads=4, key_heads=None, width=16, rows=2):
    """Queries, keys and values float32."""
    random = np.random.default_rng(0)
    shapes = [(rows, length, n, width) for n in (heads, key_heads or heads, key_heads or heads)]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def found(attention, operands):
    """What ``attention`` gives, and the gradients of all operands."""

    def loss(operands):
        output = attention(*operands)
        weights = jnp.asarray(np.random.default_rng(1).standard_normal(output.shape))
        return jnp.sum(weights * output**2), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(list(operands))
    return [output, *gradients]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert relative_difference(one, other) < 1e-5
