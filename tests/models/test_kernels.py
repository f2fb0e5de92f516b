"""Attention itself: masks, rows that see nothing, precision and dropout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.models.kernels import dot_product_attention
from tests.models.reference import softmax


def draw(length=5, heads=3, width=4, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((2, length, heads, width)).astype(np.float32) for _ in "qkv"]


def expected(q, k, v, mask=None):
    scores = np.einsum("BTNH,BSNH->BNTS", *(x.astype(np.float64) for x in (q, k)))
    scores /= math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None], scores, -np.inf)
    return np.einsum("BNTS,BSNH->BTNH", softmax(scores), v)


def test_attention_is_that_of_the_paper():
    q, k, v = draw()
    np.testing.assert_allclose(
        dot_product_attention(q, k, v), expected(q, k, v), rtol=1e-5, atol=1e-6
    )


def test_queries_and_keys_may_differ_in_length():
    q, k, v = draw()
    np.testing.assert_allclose(
        dot_product_attention(q[:, :2], k, v), expected(q[:, :2], k, v), rtol=1e-5, atol=1e-6
    )


def test_only_keys_in_the_mask_are_looked_at():
    q, k, v = draw()
    mask = np.tril(np.ones((2, 5, 5), bool))
    np.testing.assert_allclose(
        dot_product_attention(q, k, v, mask_BTS=jnp.asarray(mask)),
        expected(q, k, v, mask),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_masked_key_cannot_reach_the_output_by_a_single_bit():
    q, k, v = draw()
    mask = jnp.ones((2, 5, 5), bool).at[:, :3, 3:].set(False)
    before = dot_product_attention(q, k, v, mask_BTS=mask)
    k[:, 3:] *= 1e4
    v[:, 3:] = -1e30
    after = dot_product_attention(q, k, v, mask_BTS=mask)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert not np.array_equal(after[:, 3:], before[:, 3:])


def test_a_masked_key_has_no_share_however_low_the_scores_of_the_others():
    # A mask of -10,000, as in the first BERT, would lose to scores of -1,000,000.
    q, k = jnp.full((1, 1, 1, 4), 1e3), jnp.full((1, 2, 1, 4), -1e3).at[:, 1].set(0)
    v = jnp.arange(2.0)[None, :, None, None] * jnp.ones((1, 2, 1, 4))
    mask = jnp.array([[[True, False]]])
    assert dot_product_attention(q, k, v, mask_BTS=mask).ravel().tolist() == [0, 0, 0, 0]


def test_a_query_that_sees_nothing_gets_the_mean_and_stays_finite():
    q, k, v = draw()
    output = dot_product_attention(q, k, v, mask_BTS=jnp.zeros((2, 5, 5), bool))
    mean = np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    np.testing.assert_allclose(output, mean, rtol=1e-5, atol=1e-6)


def test_scores_and_softmax_of_bfloat16_inputs_are_float32():
    # Scores 257 and 258 over the root of 2: bfloat16 has only 256 and 258.
    q = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    k = jnp.array([[256, 1], [256, 2]], jnp.bfloat16)[None, :, None]
    v = jnp.array([[0, 0], [1, 1]], jnp.bfloat16)[None, :, None]
    output = dot_product_attention(q, k, v)
    assert output.dtype == jnp.bfloat16
    share = 1 / (1 + math.exp(-1 / math.sqrt(2)))
    np.testing.assert_allclose(np.asarray(output, np.float32).ravel(), share, rtol=2**-8)


def test_dropout_zeroes_its_share_of_probabilities_and_scales_up_the_rest():
    # With equal scores and one-hot values the output is the probabilities themselves.
    length, rate = 64, 0.25
    zeros = jnp.zeros((2, length, 3, length))
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None], zeros.shape)
    output = dot_product_attention(
        zeros, zeros, v, dropout_rate=rate, dropout_key=jax.random.key(0)
    )
    kept = np.asarray(output) > 0
    np.testing.assert_allclose(output[kept], 1 / length / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 0.01
    assert not np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[:, :, 0], kept[:, :, 1])


def test_without_a_key_nothing_is_dropped():
    q, k, v = draw()
    np.testing.assert_array_equal(
        dot_product_attention(q, k, v, dropout_rate=0.5), dot_product_attention(q, k, v)
    )
