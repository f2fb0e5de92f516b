"""Activations by value, and plain and gated feed-forward layers against numpy."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.layers.feed_forward import ACTIVATIONS, FeedForward
from tests.models import reference

NUMPY = {
    "gelu": reference.gelu,
    "gelu_tanh": reference.gelu_tanh,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": reference.silu,
}


@pytest.mark.parametrize(
    ("name", "at_one", "at_minus_two"),
    [
        ("gelu", 0.8413447, -0.0455003),
        ("gelu_tanh", 0.8411920, -0.0454023),
        ("quick_gelu", 0.8457958, -0.0643414),
        ("relu", 1.0, 0.0),
        ("silu", 0.7310586, -0.2384058),
    ],
)
def test_activations_have_their_published_values(name, at_one, at_minus_two):
    values = ACTIVATIONS[name](jnp.array([1.0, -2.0, 0.0]))
    np.testing.assert_allclose(values, [at_one, at_minus_two, 0.0], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_follow_their_formulas(name):
    x = np.linspace(-6, 6, 201, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), NUMPY[name](x.astype(np.float64)), atol=1e-6)


CONFIG = TransformerConfig(hidden_size=6, num_layers=1, num_heads=3, intermediate_size=5)
X = np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)


def make(config, **options):
    module = FeedForward(config, ComputeConfig(), **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    return module, reference.randomize(nn.meta.unbox(shapes))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("gated", "activation"),
    [(False, "gelu"), (True, "gelu"), (True, "silu")],
    ids=["plain", "geglu", "swiglu"],
)
def test_feed_forward_is_that_of_the_paper(gated, activation, bias):
    config = replace(CONFIG, gated=gated, activation=activation, mlp_bias=bias)
    module, params = make(config)
    assert params.keys() == ({"up", "gate", "down"} if gated else {"up", "down"})
    assert {"bias" in layer for layer in params.values()} == {bias}
    expected = reference.feed_forward(params, X, NUMPY[activation])
    ours = jax.jit(module.apply)({"params": params}, X)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_is_dropped_inside_is_dropped_in_training_alone():
    config = replace(CONFIG, activation_dropout=0.5)
    module, params = make(config)
    rngs = {"dropout": jax.random.key(0)}
    plain = module.apply({"params": params}, X, rngs=rngs)
    np.testing.assert_array_equal(plain, make(CONFIG)[0].apply({"params": params}, X))
    training = make(config, deterministic=False)[0].apply({"params": params}, X, rngs=rngs)
    assert not np.array_equal(training, plain)
