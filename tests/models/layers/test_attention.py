"""The attention layer: grouped heads, contexts, rotary positions and caches against numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import ComputeConfig, Rope, TransformerConfig
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.attention import Attention
from flax_transformers.models.layers.positions import rotary_tables
from flax_transformers.testing import tiny_architecture
from tests.models import reference

CONFIG = TransformerConfig(hidden_size=6, num_layers=1, num_heads=3, intermediate_size=5)
GROUPED = replace(CONFIG, num_heads=6, num_key_value_heads=2, head_dim=4)
SEGMENTS = jnp.array([[1, 1, 1, 1], [0, 1, 1, 1]])
random = np.random.default_rng(0)
X = random.standard_normal((2, 4, 6)).astype(np.float32)
CONTEXT = random.standard_normal((2, 5, 6)).astype(np.float32)


def make(config, **options):
    layer = Attention(config, ComputeConfig(), **options)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X)["params"]
    return layer, reference.randomize(nn.meta.unbox(shapes))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_layer_with_an_odd_number_of_heads_is_that_of_the_paper():
    layer, params = make(CONFIG)
    assert jax.tree.map(np.shape, params) == {
        "query": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "key": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "value": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "output": {"kernel": (3, 2, 6), "bias": (6,)},
    }
    ours, _ = jax.jit(layer.apply)({"params": params}, X, AttentionMask.within(SEGMENTS))
    mask = np.asarray(SEGMENTS[:, :, None] == SEGMENTS[:, None, :])
    close(ours, reference.attention(params, X, mask))


@pytest.mark.slow
def test_grouped_heads_are_plain_heads_whose_keys_and_values_are_shared_by_neighbours():
    layer, params = make(GROUPED)
    assert params["query"]["kernel"].shape == (6, 6, 4)
    assert params["key"]["kernel"].shape == params["value"]["kernel"].shape == (6, 2, 4)
    ours, seen = jax.jit(layer.apply)({"params": params}, X)
    assert seen.keys.shape == seen.values.shape == (2, 2, 4, 4)
    plain = params | {
        name: jax.tree.map(lambda leaf: np.repeat(leaf, 3, axis=-2), params[name])
        for name in ("key", "value")
    }
    close(ours, reference.attention(plain, X, np.ones((2, 4, 4), bool)))


@pytest.mark.parametrize(
    ("left_out", "kept"), [("qkv_bias", {"output"}), ("output_bias", {"query", "key", "value"})]
)
def test_biases_can_be_left_out_on_either_side(left_out, kept):
    _, params = make(replace(CONFIG, **{left_out: False}))
    assert {name for name in params if "bias" in params[name]} == kept


@pytest.mark.slow
def test_cross_attention_takes_keys_and_values_from_the_context():
    layer, params = make(CONFIG)
    apply = jax.jit(lambda context: layer.apply({"params": params}, X, context_BSD=context))
    ours, seen = apply(CONTEXT)
    p = reference.float64(params)
    for found, name in ((seen.keys, "key"), (seen.values, "value")):
        expected = np.einsum("BSD,DNH->BSNH", CONTEXT, p[name]["kernel"]) + p[name]["bias"]
        close(found, expected.swapaxes(1, 2))
    # A row whose queries are those of x and whose context is x too is self-attention.
    everything = np.ones((2, 4, 4), bool)
    close(apply(X)[0], reference.attention(params, X, everything))
    assert ours.shape == X.shape


@pytest.mark.slow
def test_a_cache_alone_is_looked_at_as_it_is():
    layer, params = make(CONFIG)
    apply = jax.jit(layer.apply)
    expected, seen = apply({"params": params}, X, context_BSD=CONTEXT)
    ours, kept = apply({"params": params}, X, cache=seen)
    close(ours, expected)  # the same sums in another order
    np.testing.assert_array_equal(kept.keys, seen.keys)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["plain", "grouped"])
def test_new_keys_and_values_are_written_at_the_index_and_nowhere_else(config):
    layer, params = make(config)
    old = jnp.full((2, config.kv_heads, 7, config.head_width), 5.0)
    mask = AttentionMask(jnp.ones((2, 4), int), jnp.ones((2, 7), int).at[:, 6:].set(0))
    _, alone = jax.jit(layer.apply)({"params": params}, X)
    apply = jax.jit(
        lambda index: layer.apply(
            {"params": params}, X, mask, cache=KeyValues(old, old), index=index
        )
    )
    for index in (0, 2):
        _, seen = apply(jnp.int32(index))
        for now, new in ((seen.keys, alone.keys), (seen.values, alone.values)):
            expected = np.array(old)
            expected[:, :, index : index + 4] = new
            close(now, expected)


@pytest.mark.slow
def test_a_row_read_token_by_token_into_the_cache_is_the_row_read_at_once():
    layer, params = make(GROUPED)
    positions = jnp.broadcast_to(jnp.arange(4)[None], (2, 4))
    cos, sin = rotary_tables(Rope(), 4, positions)
    causal = AttentionMask(SEGMENTS, SEGMENTS, positions, positions, causal=True)
    expected, _ = jax.jit(layer.apply)({"params": params}, X, causal, rotary=(cos, sin))
    empty = jnp.zeros((2, 2, 4, 4))
    cache, outputs = KeyValues(empty, empty), []

    @jax.jit
    def step(cache, place):
        def cut(array):
            return jax.lax.dynamic_slice_in_dim(array, place, 1, axis=1)

        # What is not written yet counts as padding.
        known = jnp.where(jnp.arange(4)[None] <= place, SEGMENTS, -1)
        mask = AttentionMask(cut(SEGMENTS), known, cut(positions), positions, causal=True)
        return layer.apply(
            {"params": params},
            cut(jnp.asarray(X)),
            mask,
            rotary=(cut(cos), cut(sin)),
            cache=cache,
            index=place,
        )

    for place in range(4):
        output, cache = step(cache, jnp.int32(place))
        outputs.append(output)
    close(np.concatenate(outputs, axis=1), expected)


@pytest.mark.slow
def test_keys_and_queries_are_turned_and_values_are_not():
    layer, params = make(CONFIG)
    positions = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    _, plain = layer.apply({"params": params}, X)
    _, turned = layer.apply({"params": params}, X, rotary=rotary_tables(Rope(), 2, positions))
    angle = np.asarray(positions, np.float64)[:, None, :]
    first, second = np.asarray(plain.keys[..., 0]), np.asarray(plain.keys[..., 1])
    close(turned.keys[..., 0], first * np.cos(angle) - second * np.sin(angle))
    close(turned.keys[..., 1], second * np.cos(angle) + first * np.sin(angle))
    np.testing.assert_array_equal(turned.values, plain.values)


def test_rotary_attention_knows_only_how_far_apart_tokens_are():
    layer, params = make(CONFIG)
    positions = jnp.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    outputs = [
        layer.apply({"params": params}, X, rotary=rotary_tables(Rope(), 2, positions + shift))[0]
        for shift in (0, 40)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    spread = layer.apply({"params": params}, X, rotary=rotary_tables(Rope(), 2, 2 * positions))[0]
    assert not np.allclose(spread, outputs[0], atol=1e-2)


@pytest.mark.slow
def test_dropout_works_in_training_alone():
    def run(dropout, deterministic, key):
        layer = Attention(
            replace(CONFIG, attention_dropout=dropout), ComputeConfig(), deterministic
        )
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(layer.apply({"params": params}, X, rngs=rngs)[0])

    _, params = make(CONFIG)
    np.testing.assert_array_equal(run(0.5, True, 0), run(0.0, False, 0))
    assert not np.array_equal(run(0.5, False, 0), run(0.5, False, 1))
    np.testing.assert_array_equal(run(0.5, False, 0), run(0.5, False, 0))


@pytest.mark.parametrize(
    ("architecture", "mask", "bias"),
    [
        ("Gemma2Model", {"causal": True, "window": (1, None)}, None),
        ("T5ForConditionalGeneration", {}, random.standard_normal((4, 5)).astype(np.float32)),
    ],
    ids=["grouped_heads_with_softcap_and_window", "relative_position_bias"],
)
def test_stored_probabilities_times_values_are_what_the_heads_attend_to(architecture, mask, bias):
    """With an identity as the output projection, the layer returns what its heads attend to."""
    config = tiny_architecture(architecture)
    if bias is None:
        config = replace(config, num_key_value_heads=2, attention_softcap=0.5)
    layer = Attention(config, ComputeConfig())
    x_BTD = random.standard_normal((2, 4, 32)).astype(np.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x_BTD)["params"]
    params = reference.randomize(nn.meta.unbox(shapes))
    params["output"]["kernel"] = np.eye(32, dtype=np.float32).reshape(4, 8, 32)
    (attended_BTD, kept), stored = jax.jit(partial(layer.apply, mutable=["intermediates"]))(
        {"params": params},
        x_BTD,
        AttentionMask(SEGMENTS, SEGMENTS, **mask),
        bias=None if bias is None else RelativePositionBias(jnp.asarray(bias)),
    )
    (probabilities_BNTS,) = stored["intermediates"]["probabilities"]
    values_BNSH = np.repeat(kept.values, 4 // config.kv_heads, axis=1)
    expected_BTNH = np.einsum("BNTS,BNSH->BTNH", probabilities_BNTS, values_BNSH)
    close(attended_BTD, expected_BTNH.reshape(x_BTD.shape))
