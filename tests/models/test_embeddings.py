"""Lookups, their gradients, and the padding of the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.models.embeddings import Embedding, lookup, mask_padded_vocabulary
from flax_transformers.objectives.cross_entropy import cross_entropy
from tests.models.reference import equations, softmax

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_a_lookup_gives_rows():
    ids = np.array([[3, 0], [1, 1]])
    np.testing.assert_array_equal(lookup(TABLE, ids), TABLE[ids])


def test_an_id_out_of_range_is_loud():
    assert np.isnan(lookup(TABLE, jnp.array([4]))).all()


def test_the_gradient_of_a_row_is_the_sum_over_its_uses():
    ids = np.array([[3, 0, 3], [1, 3, 1]])
    weight = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    ours = jax.grad(lambda table: jnp.sum(lookup(table, ids) * weight))(TABLE)
    expected = np.zeros((4, 3))
    np.add.at(expected, ids, weight)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


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


def test_attend_gives_float32_inner_products_with_every_row():
    embedding = Embedding(rows=4, features=3, dtype=jnp.bfloat16)
    hidden = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(jnp.bfloat16)
    logits = embedding.apply({"params": {"embedding": TABLE}}, hidden, method="attend")
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
