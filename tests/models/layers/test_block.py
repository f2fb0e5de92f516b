"""One layer against numpy, with its norms before and after, with and without a context."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.kernels.kv_cache import KeyValues, LayerCache
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.layers.block import LayerInputs, LayerOutput, TransformerBlock
from tests.models import reference

CONFIG = TransformerConfig(
    hidden_size=6,
    num_layers=1,
    num_heads=3,
    intermediate_size=5,
    norm_eps=1e-3,
)
X = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)


CONTEXT = np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)


def run(config, inputs=None, cache=None, **options):
    """The new hidden states, what else comes back, and the parameters in float64."""
    inputs = LayerInputs() if inputs is None else inputs
    block = TransformerBlock(config, ComputeConfig(), **options)
    shapes = jax.eval_shape(block.init, jax.random.key(0), X, inputs, None)["params"]
    params = reference.randomize(nn.meta.unbox(shapes))
    rngs = {"dropout": jax.random.key(0)}
    output, out = jax.jit(block.apply)({"params": params}, X, inputs, cache, rngs=rngs)
    return np.asarray(output), out, reference.float64(params)


def norms(p):
    return lambda x, name: reference.layer_norm(x, p[name]["scale"], p[name]["bias"], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_layer_is_attention_then_feed_forward_each_with_residual_and_norm(place):
    segments = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    inputs = LayerInputs(mask=AttentionMask.within(segments))
    ours, out, p = run(replace(CONFIG, norm_position=place), inputs)
    assert out == LayerOutput()
    mask = np.asarray(segments[:, :, None] == segments[:, None, :])
    norm = norms(p)
    x = X.astype(np.float64)
    if place == "pre":
        x = x + reference.attention(p["attention"], norm(x, "attention_norm"), mask)
        x = x + reference.feed_forward(p["mlp"], norm(x, "mlp_norm"), reference.gelu)
    else:
        x = norm(x + reference.attention(p["attention"], x, mask), "attention_norm")
        x = norm(x + reference.feed_forward(p["mlp"], x, reference.gelu), "mlp_norm")
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-5)


def cross_attention(params, x, context, mask):
    """What the tokens of ``x`` gather from ``context``: rows of self-attention over both."""
    both = np.concatenate([x, context], axis=1)
    length = x.shape[1]
    allowed = np.ones((x.shape[0], both.shape[1], both.shape[1]), bool)
    allowed[:, :, :length] = False
    allowed[:, :length, length:] = mask[:, None, :]
    return reference.attention(params, both, allowed)[:, :length]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pre", "post"])
def test_cross_attention_stands_between_and_looks_at_the_unpadded_context(place):
    there = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = LayerInputs(
        context_BSD=jnp.asarray(CONTEXT),
        context_mask=AttentionMask(jnp.ones((2, 4), int), jnp.asarray(there)),
    )
    ours, _, p = run(replace(CONFIG, norm_position=place), inputs, cross_attention=True)
    norm, everything = norms(p), np.ones((2, 4, 4), bool)
    x = X.astype(np.float64)
    for name in ("attention", "cross_attention", "mlp"):
        y = norm(x, f"{name}_norm") if place == "pre" else x
        if name == "attention":
            y = x + reference.attention(p[name], y, everything)
        elif name == "cross_attention":
            y = x + cross_attention(p[name], y, CONTEXT, there == 1)
        else:
            y = x + reference.feed_forward(p[name], y, reference.gelu)
        x = y if place == "pre" else norm(y, f"{name}_norm")
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_context_is_needed_once_and_is_cached_from_then_on():
    empty = KeyValues(jnp.zeros((2, 3, 4, 2)), jnp.zeros((2, 3, 4, 2)))
    first = LayerInputs(context_BSD=jnp.asarray(CONTEXT), index=jnp.int32(0))
    before, out, _ = run(CONFIG, first, LayerCache(own=empty), cross_attention=True)
    assert out.cache.cross.keys.shape == (2, 3, 5, 2)
    renewed = LayerCache(own=empty, cross=out.cache.cross)
    later = LayerInputs(index=jnp.int32(0))
    after, again, _ = run(CONFIG, later, renewed, cross_attention=True)
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(again.cache.cross.values, out.cache.cross.values)


@pytest.mark.slow
def test_without_biases_no_parameter_is_one():
    config = replace(
        CONFIG,
        norm="rms",
        gated=True,
        activation="silu",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
    _, _, params = run(config)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)} == {
        "kernel",
        "scale",
    }


@pytest.mark.slow
def test_each_drop_rate_acts_in_training_alone():
    plain, _, _ = run(CONFIG)
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}
    np.testing.assert_array_equal(run(replace(CONFIG, **rates), deterministic=True)[0], plain)
    for rate in rates:
        one = replace(CONFIG, **{rate: 0.5})
        assert not np.array_equal(run(one, deterministic=False)[0], plain)
