"""Dropout as a layer: threefry as in Flax, gradients, dtypes, whole examples and meshes."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.kernels.dropout import drop_path, dropout
from flax_transformers.models.layers.dropout import Dropout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threefry_gives_the_bits_of_flax(dtype):
    x = jnp.linspace(-3, 3, 600).reshape(2, 10, 30).astype(dtype)
    rngs = {"dropout": jax.random.key(7)}

    class Two(nn.Module):
        dropout: type

        @nn.compact
        def __call__(self, x):
            return self.dropout(0.3)(x, False), self.dropout(0.1)(x, False)

    both = (Two(partial(Dropout, generator="threefry")), Two(nn.Dropout))
    ours, of_flax = jax.jit(lambda x: [one.apply({}, x, rngs=rngs) for one in both])(x)
    for mine, theirs in zip(ours, of_flax, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("generator", ["hash", "threefry"])
def test_the_gradient_has_the_mask_of_the_output(generator):
    x, key = jnp.linspace(1, 2, 4096).reshape(8, 512), jax.random.key(0)

    def run(x):
        out, grads = jax.vjp(lambda x: dropout(x, 0.4, key, generator), x)
        return out, *grads(jnp.ones_like(out))

    out, gradient = (np.asarray(value) for value in jax.jit(run)(x))
    np.testing.assert_allclose(out, gradient * x, rtol=1e-6)
    np.testing.assert_allclose(gradient[gradient > 0], 1 / 0.6, rtol=1e-6)


@pytest.mark.slow
def test_the_hash_keeps_no_mask_for_the_backward_pass():
    x, key = jnp.ones((8, 512)), jax.random.key(0)
    _, grads = jax.vjp(lambda x: dropout(x, 0.4, key, "hash"), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(grads)) == 2


def test_bfloat16_is_scaled_in_float32():
    # 1 / 0.9 rounds to 1.109375; divided by 0.9 in bfloat16 it would be 1.1171875.
    key = jax.random.key(0)
    out = jax.jit(lambda: dropout(jnp.ones((4, 64), jnp.bfloat16), 0.1, key, "hash"))()
    assert out.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(out, np.float32))) == {0, 1.109375}


@pytest.mark.parametrize("generator", ["hash", "threefry"])
def test_whole_examples_are_dropped_with_a_rate_that_may_be_traced(generator):
    y, key = jnp.ones((400, 3, 2)), jax.random.key(1)
    dropped = jax.jit(lambda rate: drop_path(y, rate, key, generator))
    out = np.asarray(dropped(jnp.float32(0.25))).reshape(400, -1)
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert (out == out[:, :1]).all()
    assert abs((out[:, 0] > 0).sum() - 300) < 5 * (400 * 0.75 * 0.25) ** 0.5
    np.testing.assert_array_equal(dropped(jnp.float32(0.0)), y)


@pytest.mark.slow
def test_a_mask_is_the_same_however_the_array_is_divided():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
    x, key = jnp.ones((64, 128)), jax.random.key(0)
    run = jax.jit(lambda x: dropout(x, 0.3, key, "hash"), out_shardings=sharding)
    divided = jax.device_put(x, sharding)
    np.testing.assert_array_equal(run(divided), dropout(x, 0.3, key, "hash"))
    text = run.lower(divided).compile().as_text()
    assert not any(name in text for name in ("all-", "collective", "permute", "reduce-scatter"))
