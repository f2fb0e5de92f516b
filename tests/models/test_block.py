"""One layer against numpy, with its norms before and after."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.block import TransformerBlock
from flax_transformers.models.config import TransformerConfig
from tests.models import reference

CONFIG = TransformerConfig(
    vocab_size=8,
    hidden_size=6,
    num_layers=1,
    num_heads=3,
    intermediate_size=5,
    max_positions=8,
    norm_eps=1e-3,
)
X = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)


def run(config, mask=None, **options):
    block = TransformerBlock(config, jnp.float32, **options)
    shapes = jax.eval_shape(block.init, jax.random.key(0), X, {"mask_BTS": mask}, None)["params"]
    params = reference.randomize(nn.meta.unbox(shapes))
    rngs = {"dropout": jax.random.key(0)}
    (output, out) = jax.jit(block.apply)({"params": params}, X, {"mask_BTS": mask}, None, rngs=rngs)
    assert out is None
    return np.asarray(output), reference.float64(params)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_layer_is_attention_then_feed_forward_each_with_residual_and_norm(place):
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    mask = mask[:, :, None] == mask[:, None, :]
    ours, p = run(replace(CONFIG, norm_place=place), jnp.asarray(mask))

    def norm(x, name):
        return reference.layer_norm(x, p[name]["scale"], p[name]["bias"], 1e-3)

    x = X.astype(np.float64)
    if place == "pre":
        x = x + reference.attention(p["attention"], norm(x, "attention_norm"), mask)
        x = x + reference.feed_forward(p["mlp"], norm(x, "mlp_norm"), reference.gelu)
    else:
        x = norm(x + reference.attention(p["attention"], x, mask), "attention_norm")
        x = norm(x + reference.feed_forward(p["mlp"], x, reference.gelu), "mlp_norm")
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-5)


def test_without_biases_no_parameter_is_one():
    config = replace(CONFIG, norm="rms", gated=True, activation="silu", use_bias=False)
    _, params = run(config)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)} == {
        "kernel",
        "scale",
    }


@pytest.mark.slow
def test_each_drop_rate_acts_in_training_alone():
    plain, _ = run(CONFIG)
    both = replace(CONFIG, dropout=0.5, attention_dropout=0.5)
    np.testing.assert_array_equal(run(both, deterministic=True)[0], plain)
    for rate in ("dropout", "attention_dropout"):
        one = replace(CONFIG, **{rate: 0.5})
        assert not np.array_equal(run(one, deterministic=False)[0], plain)
