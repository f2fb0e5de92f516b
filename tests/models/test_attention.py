"""The attention layer and its masks."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.attention import Attention, segment_mask
from tests.models import reference


def test_tokens_see_their_own_segment_and_padding_sees_padding():
    mask = segment_mask(jnp.array([[1, 1, 2, 0]]), jnp.array([[1, 1, 2, 0]]))
    assert mask.astype(int).tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]


def test_the_layer_with_an_odd_number_of_heads_is_that_of_the_paper():
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])
    mask = mask[:, :, None] == mask[:, None, :]
    layer = Attention(num_heads=3, head_dim=2, dtype=jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = reference.randomize(nn.meta.unbox(shapes))
    assert jax.tree.map(np.shape, params) == {
        "query": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "key": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "value": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "output": {"kernel": (3, 2, 6), "bias": (6,)},
    }
    ours = jax.jit(layer.apply)({"params": params}, x, jnp.asarray(mask))
    np.testing.assert_allclose(ours, reference.attention(params, x, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dropout_works_in_training_alone():
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)

    def run(dropout, deterministic, key):
        layer = Attention(3, 2, jnp.float32, dropout=dropout, deterministic=deterministic)
        return np.asarray(layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(key)}))

    shapes = jax.eval_shape(Attention(3, 2, jnp.float32).init, jax.random.key(0), x)["params"]
    params = reference.randomize(nn.meta.unbox(shapes))
    np.testing.assert_array_equal(run(0.5, True, 0), run(0.0, False, 0))
    assert not np.array_equal(run(0.5, False, 0), run(0.5, False, 1))
    np.testing.assert_array_equal(run(0.5, False, 0), run(0.5, False, 0))
