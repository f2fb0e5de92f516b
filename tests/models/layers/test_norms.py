"""Norms against float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.layers.norms import make_norm
from tests.models.reference import layer_norm, randomize, rms_norm


def run(kind, x, dtype=jnp.float32, eps=1e-6):
    config = TransformerConfig(
        hidden_size=4, num_layers=1, num_heads=1, intermediate_size=4, norm=kind, norm_eps=eps
    )
    module = make_norm(config, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = randomize(nn.meta.unbox(shapes))
    return np.asarray(jax.jit(module.apply)({"params": params}, x)), params


def test_layer_norm_keeps_its_digits_far_from_zero():
    # E[x^2] - E[x]^2 in float32 has nothing left of a deviation of 1 around 10,000.
    x = np.random.default_rng(0).normal(1e4, 1.0, (3, 64)).astype(np.float32)
    ours, params = run("layer", x)
    expected = layer_norm(x, params["scale"], params["bias"], 1e-6)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    fast = np.mean(x**2, axis=-1) - np.mean(x, axis=-1) ** 2
    assert not np.allclose(fast, x.astype(np.float64).var(axis=-1), rtol=0.5)


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_layer_norm_is_that_of_the_paper(eps):
    x = np.random.default_rng(0).normal(0.5, 0.1, (3, 48)).astype(np.float32)
    ours, params = run("layer", x, eps=eps)
    expected = layer_norm(x, params["scale"], params["bias"], eps)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_is_that_of_the_paper_and_has_no_bias():
    x = np.random.default_rng(0).normal(0.5, 0.1, (3, 48)).astype(np.float32)
    ours, params = run("rms", x)
    assert params.keys() == {"scale"}
    np.testing.assert_allclose(ours, rms_norm(x, params["scale"], 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_bfloat16_input_is_normalised_in_float32(kind):
    x = np.random.default_rng(0).normal(8, 1, (3, 512)).astype(jnp.bfloat16)
    ours, params = run(kind, x, jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    if kind == "layer":
        expected = layer_norm(x, params["scale"], params["bias"], 1e-6)
    else:
        expected = rms_norm(x, params["scale"], 1e-6)
    # One rounding, at the end: half a unit in the last of eight binary digits.
    np.testing.assert_allclose(ours.astype(np.float64), expected, rtol=2**-8, atol=1e-6)
