"""Values and derivatives in closed form against float64, and against autodiff of the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from flax_transformers.models.kernels.closed_form import gelu, gelu_tanh, standardized

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
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(ours)))(x), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ours", "reference"), [(gelu, exact), (gelu_tanh, by_tanh)])
def test_bfloat16_is_rounded_once_at_the_end(ours, reference):
    x = jnp.asarray(X, jnp.bfloat16)
    value, slope = reference(np.asarray(x, np.float64))
    assert ours(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours(x), np.float64), value, rtol=2**-8, atol=1e-6)
    grad = jax.jit(jax.vmap(jax.grad(ours)))(x)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), slope, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("function", [gelu, gelu_tanh])
def test_a_backward_pass_keeps_one_array(function):
    x = jnp.ones((3, 5))
    _, backward = jax.vjp(function, x)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == x.shape]
    assert len(kept) == 1


def definition(x, eps):
    deviation = x - jnp.mean(x, axis=-1, keepdims=True)
    return deviation / jnp.sqrt(jnp.mean(deviation**2, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-12, 1e-1])
def test_value_and_gradient_are_those_of_the_definition(eps):
    keys = jax.random.split(jax.random.key(0))
    x, weight = (jax.random.normal(key, (3, 5, 32)) + 2.0 for key in keys)
    np.testing.assert_allclose(standardized(x, eps), definition(x, eps), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x, eps) * weight)))(x)
        for f in (standardized, definition)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_gives_float32_and_a_gradient_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (4, 32)).astype(jnp.bfloat16)
    result, backward = jax.vjp(lambda x: standardized(x, 1e-6), x)
    assert result.dtype == jnp.float32
    (gradient,) = backward(jnp.ones_like(result))
    assert gradient.dtype == jnp.bfloat16
