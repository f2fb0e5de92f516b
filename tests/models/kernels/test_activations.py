"""GELU and its derivative against float64, and what a backward pass keeps of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from flax_transformers.models.kernels.activations import gelu, gelu_tanh

X = np.linspace(-12.0, 12.0, 4801)


def exact(x):
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return x * ndtr(x), ndtr(x) + x * density


def by_tanh(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = np.tanh(inner)
    return x * (1 + tanh) / 2, (1 + tanh) / 2 + x * (1 - tanh**2) * slope / 2


@pytest.mark.parametrize(("ours", "reference"), [(gelu, exact), (gelu_tanh, by_tanh)])
def test_value_and_derivative_are_those_of_float64(ours, reference):
    value, slope = reference(X)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(ours(x), value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ours", "reference"), [(gelu, exact), (gelu_tanh, by_tanh)])
def test_bfloat16_is_rounded_once_at_the_end(ours, reference):
    x = jnp.asarray(X, jnp.bfloat16)
    value, slope = reference(np.asarray(x, np.float64))
    assert ours(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours(x), np.float64), value, rtol=2**-8, atol=1e-6)
    grad = jax.vmap(jax.grad(ours))(x)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), slope, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("function", [gelu, gelu_tanh])
def test_a_backward_pass_keeps_one_array(function):
    x = jnp.ones((3, 5))
    _, backward = jax.vjp(function, x)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == x.shape]
    assert len(kept) == 1
