"""Attention itself: masks, grouped heads, rows that see nothing, precision and dropout."""

from __future__ import annotations

import logging
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.models.kernels import dispatch
from flax_transformers.models.kernels.dispatch import dot_product_attention, probabilities_of_keys
from flax_transformers.models.kernels.masks import AttentionMask, combined_segments
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from tests.models.reference import softmax


@partial(jax.jit, static_argnames=("scale", "dropout_rate", "kernel"))
def attend(query, key, value, **options):
    return dot_product_attention(query, key, value, **options)


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
    np.testing.assert_allclose(attend(q, k, v), expected(q, k, v), rtol=1e-5, atol=1e-6)


def test_probabilities_are_the_softmax_of_the_scores_without_another_product():
    q, k, _ = draw()
    identity = np.broadcast_to(np.eye(5)[:, None], (2, 5, 3, 5))
    found = jax.jit(probabilities_of_keys)(q, k)
    np.testing.assert_allclose(found.swapaxes(1, 2), expected(q, k, identity), rtol=1e-5)
    assert jax.jit(probabilities_of_keys).lower(q, k).as_text().count("dot_general") == 1


@pytest.mark.slow
@pytest.mark.parametrize("shared", [1, 3])
def test_values_may_have_another_width_than_keys(shared):
    q, k, v = draw(width=8)
    q, k, v = q[..., :3], k[:, :, ::shared, :3], v[:, :, ::shared]
    found = attend(q, k, v)
    np.testing.assert_allclose(
        found, expected(q, *(np.repeat(x, shared, 2) for x in (k, v))), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_for_equal_widths_refuses_others(kernel):
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(128, heads=2, width=16))
    with pytest.raises(UserError, match=f"{kernel} cannot use values of another width"):
        dot_product_attention(q, k, v[..., :8], kernel=kernel)


@pytest.mark.slow
def test_queries_and_keys_may_differ_in_length():
    q, k, v = draw()
    np.testing.assert_allclose(
        attend(q[:, :2], k, v), expected(q[:, :2], k, v), rtol=1e-5, atol=1e-6
    )


def segments(*rows):
    return AttentionMask.within(jnp.array(rows))


def test_tokens_see_their_own_segment_and_padding_sees_padding():
    mask = segments([1, 1, 2, 0]).dense(4, 4)
    assert mask.astype(int).tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]


def test_a_mask_that_asks_for_nothing_is_no_array():
    assert AttentionMask().dense(4, 4) is None
    assert AttentionMask.within(None).dense(4, 4) is None


def seen(mask, queries=5, keys=5):
    """The keys that each query of the first row may look at."""
    return [np.flatnonzero(row).tolist() for row in np.asarray(mask.dense(queries, keys))[0]]


def test_a_causal_query_sees_itself_and_what_came_before():
    assert seen(AttentionMask(causal=True)) == [list(range(t + 1)) for t in range(5)]


@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 2), (1, 1), (9, 9)])
def test_a_window_ends_so_many_tokens_away_on_each_side(left, right):
    expected = [[s for s in range(5) if t - left <= s <= t + right] for t in range(5)]
    assert seen(AttentionMask(window=(left, right))) == expected


def test_a_causal_window_and_segments_hold_all_at_once():
    row = jnp.array([[1, 1, 1, 2, 2]])
    mask = AttentionMask(row, row, causal=True, window=(1, 9))
    assert seen(mask) == [[0], [0, 1], [1, 2], [3], [3, 4]]


def test_distance_goes_by_positions_where_they_are_given():
    # A row whose places are shuffled, and queries that come after the keys in the row.
    keys, queries = jnp.array([[4, 2, 0, 1, 3]]), jnp.array([[1, 4]])
    mask = AttentionMask(query_positions=queries, key_positions=keys, causal=True)
    assert seen(mask, queries=2) == [[2, 3], [0, 1, 2, 3, 4]]
    near = AttentionMask(query_positions=queries, key_positions=keys, window=(1, 1))
    assert seen(near, queries=2) == [[1, 2, 3], [0, 4]]


def test_queries_and_keys_have_segments_of_their_own():
    mask = AttentionMask(jnp.array([[1, 2]]), jnp.array([[2, 1, 0]]))
    assert seen(mask, 2, 3) == [[1], [0]]


def test_the_description_of_a_mask_passes_through_jit():
    mask = AttentionMask(jnp.ones((1, 5), int), jnp.ones((1, 5), int), causal=True, window=(2, 0))
    again = jax.jit(lambda mask: mask)(mask)
    assert (again.causal, again.window) == (True, (2, 0))
    assert seen(again) == seen(mask)


MASKS = {
    "segments": segments([1, 1, 2, 2, 0], [0, 0, 1, 1, 1]),
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(window=(1, 2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_only_keys_in_the_mask_are_looked_at(name):
    q, k, v = draw()
    dense = np.broadcast_to(MASKS[name].dense(5, 5), (2, 5, 5))
    np.testing.assert_allclose(
        attend(q, k, v, mask=MASKS[name]),
        expected(q, k, v, dense),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (3, 1), (6, 3)])
def test_neighbouring_query_heads_share_a_key_head(heads, shared):
    q, k, v = draw(heads=heads)
    k, v = k[:, :, :shared], v[:, :, :shared]
    groups = heads // shared
    spread = [np.stack([x[:, :, n // groups] for n in range(heads)], axis=2) for x in (k, v)]
    np.testing.assert_allclose(attend(q, k, v), expected(q, *spread), rtol=1e-5, atol=1e-6)


def test_a_bias_is_added_to_scores_that_are_scaled_as_asked():
    q, k, v = draw()
    bias = np.random.default_rng(1).standard_normal((1, 3, 5, 5)).astype(np.float32)
    scores = 0.7 * np.einsum("BTNH,BSNH->BNTS", *(x.astype(np.float64) for x in (q, k))) + bias
    theirs = np.einsum("BNTS,BSNH->BTNH", softmax(scores), v)
    ours = attend(q, k, v, bias=bias, scale=0.7)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_bias_gets_a_gradient():
    q, k, v = draw()

    def total(bias):
        return jnp.sum(attend(q, k, v, bias=bias) ** 2)

    grad = jax.jit(jax.grad(total))(jnp.zeros((1, 3, 5, 5)))
    assert np.abs(grad).min(axis=(0, 2, 3)).shape == (3,)
    assert np.abs(grad).max(axis=(0, 2, 3)).min() > 1e-3


def test_a_masked_key_cannot_reach_the_output_by_a_single_bit():
    q, k, v = draw()
    mask = segments([1, 1, 1, 0, 0], [1, 1, 1, 0, 0])
    before = attend(q, k, v, mask=mask)
    k[:, 3:] *= 1e4
    v[:, 3:] = -1e30
    after = attend(q, k, v, mask=mask)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert not np.array_equal(after[:, 3:], before[:, 3:])


@pytest.mark.slow
def test_a_masked_key_has_no_share_however_low_the_scores_of_the_others():
    # A mask of -10,000, as in the first BERT, would lose to scores of -1,000,000.
    q, k = jnp.full((1, 1, 1, 4), 1e3), jnp.full((1, 2, 1, 4), -1e3).at[:, 1].set(0)
    v = jnp.arange(2.0)[None, :, None, None] * jnp.ones((1, 2, 1, 4))
    mask = AttentionMask(jnp.array([[1]]), jnp.array([[1, 0]]))
    assert attend(q, k, v, mask=mask).ravel().tolist() == [0, 0, 0, 0]


def test_a_query_that_sees_nothing_gets_the_mean_and_stays_finite():
    q, k, v = draw()
    nothing = AttentionMask(jnp.ones((2, 5), int), jnp.zeros((2, 5), int))
    output = attend(q, k, v, mask=nothing)
    mean = np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    np.testing.assert_allclose(output, mean, rtol=1e-5, atol=1e-6)


def test_scores_and_softmax_of_bfloat16_inputs_are_float32():
    # Scores 257 and 258 over the root of 2: bfloat16 has only 256 and 258.
    q = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    k = jnp.array([[256, 1], [256, 2]], jnp.bfloat16)[None, :, None]
    v = jnp.array([[0, 0], [1, 1]], jnp.bfloat16)[None, :, None]
    output = attend(q, k, v)
    assert output.dtype == jnp.bfloat16
    share = 1 / (1 + math.exp(-1 / math.sqrt(2)))
    np.testing.assert_allclose(np.asarray(output, np.float32).ravel(), share, rtol=2**-8)


@pytest.mark.slow
def test_dropout_zeroes_its_share_of_probabilities_and_scales_up_the_rest():
    # With equal scores and one-hot values the output is the probabilities themselves.
    length, rate = 64, 0.25
    zeros = jnp.zeros((2, length, 3, length))
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None], zeros.shape)
    output = attend(zeros, zeros, v, dropout_rate=rate, dropout_key=jax.random.key(0))
    kept = np.asarray(output) > 0
    np.testing.assert_allclose(output[kept], 1 / length / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 0.01
    assert not np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[:, :, 0], kept[:, :, 1])


def test_without_a_key_nothing_is_dropped():
    q, k, v = draw()
    np.testing.assert_array_equal(attend(q, k, v, dropout_rate=0.5), attend(q, k, v))


def test_a_mask_and_segments_together_leave_out_what_either_leaves_out():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    mask = jnp.array([[1, 0, 1, 1, 1]])
    assert combined_segments(None, None) is None
    assert combined_segments(mask, None) is mask
    assert combined_segments(None, segments) is segments
    assert combined_segments(mask, segments).tolist() == [[1, 0, 2, 2, 0]]


def long(length=128):
    return draw(length, heads=2)


DROPPING = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
CANNOT = {
    "apply model.attention_dropout with compute.dropout_generator threefry": {
        **DROPPING,
        "dropout_generator": "threefry",
    },
    "apply model.attention_dropout with grouped heads or windows": {
        **DROPPING,
        "mask": AttentionMask(window=(1, 1)),
    },
    "mask by position_ids": {
        "mask": AttentionMask(query_positions=jnp.arange(128)[None], causal=True)
    },
    "use a prefix mask": {"mask": AttentionMask(key_prefix=jnp.ones((2, 128), bool), causal=True)},
    "use a bias other than by distance": {"bias": jnp.zeros((1, 2, 128, 128))},
    "relative bias with cross-attention, grouped heads or windows": {
        "mask": AttentionMask(window=(1, 1)),
        "bias": RelativePositionBias(jnp.zeros((2, 3))),
    },
}


@pytest.mark.parametrize("reason", CANNOT)
def test_a_kernel_that_was_asked_for_says_what_it_cannot_do(reason):
    with pytest.raises(UserError, match=f"splash cannot .*{reason}.*attention to auto"):
        dot_product_attention(*long(), **CANNOT[reason], kernel="splash")


def test_rows_that_are_shorter_than_a_block_are_for_plain_operations(caplog):
    q, k, v = long(127)
    with pytest.raises(UserError, match="splash cannot divide 127 positions"):
        dot_product_attention(q, k, v, kernel="splash")
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            ours = dot_product_attention(q, k, v, kernel="splash or xla")
    np.testing.assert_array_equal(ours, dot_product_attention(q, k, v))
    said = [message for message in caplog.messages if "127" in message]
    assert said == [
        "attention: xla, because splash cannot divide 127 positions into blocks of 128 on each "
        "device"
    ]


def test_plain_attention_without_an_obstacle_is_not_reported(caplog):
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO):
        dot_product_attention(*long(), kernel="xla")
    assert caplog.messages == []


def test_heads_that_the_mesh_does_not_divide_are_for_plain_operations():
    q, k, v = draw(128, heads=6)
    with (
        jax.set_mesh(make_mesh(MeshConfig(2, tensor=4))),
        nn.logical_axis_rules(RULES),
        pytest.raises(UserError, match="splash cannot divide 6 heads over .* of 4"),
    ):
        dot_product_attention(q, k, v, kernel="splash")
