"""A feed-forward in chunks is the feed-forward, on any mesh, in less memory."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.layers.feed_forward import FeedForward
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from flax_transformers.testing import relative_difference
from tests.models.reference import randomize

X = np.random.default_rng(0).standard_normal((8, 16, 8)).astype(np.float32)


def make(chunk, gated=True, bias=True, **changes):
    """A loss and its gradients by input and parameters, as a function of these, and parameters."""
    config = TransformerConfig(
        hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, gated=gated, mlp_bias=bias
    )
    module = FeedForward(config, ComputeConfig(feed_forward_chunk=chunk, **changes))
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]

    def loss(x, params):
        return jnp.sum(jnp.sin(module.apply({"params": params}, x).astype(jnp.float32)))

    def ruled(*operands):
        with nn.logical_axis_rules(RULES):
            return jax.value_and_grad(loss, argnums=(0, 1))(*operands)

    return ruled, randomize(nn.meta.unbox(shapes))


def assert_alike(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_difference(one, other) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_chunks_give_the_values_and_gradients_of_the_whole(gated, bias):
    whole, params = make(None, gated, bias)
    chunks, _ = make(4, gated, bias)
    assert "while" in jax.jit(chunks).lower(X, params).as_text()
    assert_alike(jax.jit(chunks)(X, params), jax.jit(whole)(X, params))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4, context=2)],
    ids=["data-fsdp-tensor", "fsdp-context"],
)
def test_chunks_on_a_mesh_gather_each_weight_once(mesh):
    chunks, params = make(4)
    expected = jax.jit(make(None)[0])(X, params)
    with jax.set_mesh(make_mesh(mesh)):
        program = jax.jit(chunks).lower(X, params).compile()
        assert_alike(program(X, params), expected)
    loops = [line for line in program.as_text().splitlines() if re.search(r"/while/body", line)]
    assert loops and not [line for line in loops if "all-gather" in line or "scatter(" in line]


@pytest.mark.parametrize("chunk", [16, 5])
def test_a_row_that_is_no_longer_than_a_chunk_or_does_not_divide_goes_through_whole(chunk):
    lowered = [jax.jit(make(size)[0]).lower(X, make(size)[1]).as_text() for size in (chunk, None)]
    assert lowered[0] == lowered[1]


@pytest.mark.slow
def test_chunks_take_less_memory():
    whole, chunks = (
        jax.jit(make(chunk)[0])
        .lower(jax.ShapeDtypeStruct((8, 1024, 8), jnp.float32), make(chunk)[1])
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for chunk in (None, 64)
    )
    assert chunks < whole / 2
