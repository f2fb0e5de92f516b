"""Lookups, their gradients, the input of the layers, and the padding of the vocabulary."""

from __future__ import annotations

import re
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_transformers.models.config import TextConfig
from flax_transformers.models.heads import Unembedding
from flax_transformers.models.layers.embeddings import (
    Embedding,
    InputEmbeddings,
    lookup,
    mask_padded_vocabulary,
)
from flax_transformers.objectives.cross_entropy import cross_entropy
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.partitioning import HIDDEN, constrain
from flax_transformers.parallel.rules import RULES, batch_sharding, replicated
from tests.models.reference import equations, layer_norm, randomize, softmax

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)
AXES, FLOAT32 = ("vocab", "embed"), jnp.dtype(jnp.float32)


def test_a_lookup_gives_rows():
    ids = np.array([[3, 0], [1, 1]])
    np.testing.assert_array_equal(lookup(AXES, FLOAT32, TABLE, ids), TABLE[ids])


def test_an_id_out_of_range_is_loud():
    assert np.isnan(lookup(AXES, FLOAT32, TABLE, jnp.array([4]))).all()


def test_an_id_that_is_not_in_the_vocabulary_is_loud_and_changes_nothing():
    table = Embedding(4, 3, FLOAT32, entries=3)
    variables = {"params": {"embedding": jnp.asarray(TABLE)}}
    ids = jnp.array([2, 3, 4, -1])  # 3 is padding of the table
    found = table.apply(variables, ids)
    np.testing.assert_array_equal(found[0], TABLE[2])
    assert np.isnan(found[1:]).all()
    gradient = jax.grad(lambda v: table.apply(v, ids)[0].sum())(variables)["params"]["embedding"]
    np.testing.assert_array_equal(gradient, [[0] * 3, [0] * 3, [1] * 3, [0] * 3])


@pytest.mark.slow
def test_the_gradient_of_a_row_is_the_sum_over_its_uses():
    ids = np.array([[3, 0, 3], [1, 3, 1]])
    weight = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    ours = jax.grad(lambda table: jnp.sum(lookup(AXES, FLOAT32, table, ids) * weight))(TABLE)
    expected = np.zeros((4, 3))
    np.add.at(expected, ids, weight)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_frequent_word_does_not_lose_its_gradient_in_bfloat16():
    # A running sum of ones in bfloat16 stops at 256.
    embedding = Embedding(rows=2, features=1, dtype=jnp.bfloat16)
    ids = jnp.zeros((4, 1024), jnp.int32)
    params = embedding.init(jax.random.key(0), ids)

    def total(params):
        return jnp.sum(embedding.apply(params, ids).astype(jnp.float32))

    grad = jax.tree.leaves(jax.jit(jax.grad(total))(params))[0]
    assert grad.ravel().tolist() == [4096, 0]
    scatters = [e for e in equations(jax.grad(total), params) if "scatter" in e.primitive.name]
    assert {e.outvars[0].aval.dtype for e in scatters} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "length", "crosses", "stays"),
    [(256, 4, "all-to-all", "all-gather"), (16, 64, "all-gather", "all-to-all")],
    ids=["vectors", "table"],
)
def test_the_lesser_of_vectors_and_table_crosses_the_mesh(rows, length, crosses, stays):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, 16)).astype(np.float32)
    ids = rng.integers(0, rows, (8, length)).astype(np.int32)
    weight = rng.standard_normal((8, length, 16)).astype(np.float32)

    @jax.value_and_grad
    def total(table, ids):
        return jnp.sum(constrain(lookup(AXES, FLOAT32, table, ids), HIDDEN) * weight)

    def ruled(*operands):
        with nn.logical_axis_rules(RULES):
            return total(*operands)

    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placed = [NamedSharding(mesh, PartitionSpec(None, "fsdp")), batch_sharding(mesh)]
    with jax.set_mesh(mesh):
        outputs = (replicated(mesh), placed[0])
        program = jax.jit(ruled, in_shardings=placed, out_shardings=outputs)
        program = program.lower(table, ids).compile()
        found = program(*map(jax.device_put, (table, ids), placed))
    for a, b in zip(found, total(table, ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    moved = re.findall(r"= \(?f32\[.* (all-to-all|all-gather)\(", program.as_text())
    assert crosses in moved and stays not in moved


def test_logits_are_float32_inner_products_with_every_row():
    hidden = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(jnp.bfloat16)
    logits = Unembedding(jnp.asarray(hidden), jnp.asarray(TABLE), None, size=4).logits()
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden.astype(np.float64) @ TABLE.T, rtol=1e-5, atol=1e-5)


def test_padded_vocabulary_has_probability_exactly_zero_and_no_gradient():
    logits = np.random.default_rng(0).normal(0, 5, (2, 3, 8)).astype(np.float32)
    logits[..., 5:] = 100
    labels = jnp.zeros((2, 3), jnp.int32)

    def loss(logits):
        masked = mask_padded_vocabulary(logits, 5)
        nll = cross_entropy(masked, labels)[0]
        return jnp.sum(nll), (nll, jax.nn.softmax(masked, axis=-1))

    grad, (nll, probabilities) = jax.jit(jax.grad(loss, has_aux=True))(logits)
    assert np.count_nonzero(probabilities[..., 5:]) == 0
    assert np.count_nonzero(grad[..., 5:]) == 0
    expected = -np.log(softmax(logits[..., :5].astype(np.float64))[..., 0])
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_a_vocabulary_without_padding_passes_through():
    logits = jnp.ones((1, 8))
    assert mask_padded_vocabulary(logits, 8) is logits


CONFIG = TextConfig(
    vocab_size=11,
    hidden_size=6,
    num_layers=1,
    num_heads=3,
    intermediate_size=5,
    max_positions=8,
    token_types=3,
    embedding_norm=True,
    scale_embeddings=True,
    norm_eps=1e-3,
)
WORDS = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
PLACES = jnp.array([[0, 1, 0, 1, 2], [7, 6, 5, 4, 3]])
TYPES = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])


def embed(config, places=PLACES, types=TYPES):
    """What goes into the layers, and the parameters."""
    module = InputEmbeddings(config, jnp.float32)

    def init(key):
        return module.init(key, WORDS, places, types, deterministic=True)["params"]

    params = randomize(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))))
    return module.apply({"params": params}, WORDS, places, types, deterministic=True), params


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["learned", "none"])
def test_the_input_of_the_layers_is_the_sum_of_tables_and_then_a_norm(positions):
    ours, p = embed(replace(CONFIG, positions=positions))
    assert ("position" in p) == (positions == "learned")
    total = 6**0.5 * WORDS + p["token_type"]["embedding"][TYPES]
    if positions == "learned":
        assert p["position"]["embedding"].shape == (8, 6)
        total = total + p["position"]["embedding"][PLACES]
    expected = layer_norm(total, p["norm"]["scale"], p["norm"]["bias"], 1e-3)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_table_of_positions_may_have_rows_before_the_first_position():
    ours, p = embed(replace(CONFIG, position_offset=2, token_types=0, embedding_norm=False))
    assert p["position"]["embedding"].shape == (10, 6)
    expected = 6**0.5 * WORDS + p["position"]["embedding"][PLACES + 2]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_beyond_the_last_position_all_is_nan():
    ours, _ = embed(CONFIG, places=PLACES.at[0, 4].set(8))
    assert np.isnan(ours[0, 4]).all()
    assert np.isfinite(ours[0, :4]).all()
    assert np.isfinite(ours[1]).all()


def test_tokens_without_a_type_have_the_first():
    ours, _ = embed(CONFIG, types=None)
    np.testing.assert_array_equal(ours, embed(CONFIG, types=jnp.zeros_like(PLACES))[0])
