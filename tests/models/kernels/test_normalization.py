"""The closed-form derivative of layer norm against autodiff of the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.kernels.normalization import standardized


def definition(x, eps):
    deviation = x - jnp.mean(x, axis=-1, keepdims=True)
    return deviation / jnp.sqrt(jnp.mean(deviation**2, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-12, 1e-1])
def test_value_and_gradient_are_those_of_the_definition(eps):
    keys = jax.random.split(jax.random.key(0))
    x, weight = (jax.random.normal(key, (3, 5, 32)) + 2.0 for key in keys)
    np.testing.assert_allclose(standardized(x, eps), definition(x, eps), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(f(x, eps) * weight))(x) for f in (standardized, definition)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_gives_float32_and_a_gradient_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (4, 32)).astype(jnp.bfloat16)
    result, backward = jax.vjp(lambda x: standardized(x, 1e-6), x)
    assert result.dtype == jnp.float32
    (gradient,) = backward(jnp.ones_like(result))
    assert gradient.dtype == jnp.bfloat16
