"""Encoder-decoders: masks and packed rows on both sides, cached steps, heads."""

from __future__ import annotations

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import ComputeConfig, EncoderDecoderConfig
from flax_transformers.models.encoder_decoder import (
    EncoderDecoderForConditionalGeneration,
    EncoderDecoderForSequenceClassification,
    decoder_inputs,
)
from flax_transformers.models.heads import LMHead
from flax_transformers.models.layers.embeddings import token_table
from tests.families.parity import first_by_default
from tests.models.encoder_decoders import (
    assert_packed_examples_are_as_alone,
    assert_packed_examples_do_not_see_each_other,
    assert_steps_are_as_the_full_pass,
)

CONFIG = EncoderDecoderConfig(
    vocab_size=50,
    hidden_size=12,
    num_layers=2,
    num_heads=3,
    intermediate_size=10,
    num_decoder_layers=1,
    num_decoder_heads=2,
    decoder_intermediate_size=14,
    max_positions=16,
    init_std=0.5,
)


IDS = np.random.default_rng(0).integers(0, 50, (2, 5), np.int32)


def build(kind=EncoderDecoderForConditionalGeneration, scan=True, **changes):
    """A model and random parameters."""
    model = kind(dataclasses.replace(CONFIG, **changes), ComputeConfig(scan_layers=scan))
    boxed = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())["params"]
    random = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * random.standard_normal(leaf.shape, np.float32)),
        nn.meta.unbox(boxed),
    )


@cache
def usual():
    """Logits of the usual model as a function of its inputs."""
    model, params = build()
    return jax.jit(lambda *args, **inputs: model.apply({"params": params}, *args, **inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("scan", first_by_default([True, False]), ids=["scanned", "unrolled"])
def test_packed_examples_do_not_see_each_other(scan):
    model, params = build(scan=scan)
    assert_packed_examples_do_not_see_each_other(model, params, CONFIG.vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize("norm_position", first_by_default(["pre", "post"]))
def test_packed_examples_are_as_alone(norm_position):
    model, params = build(norm_position=norm_position)
    assert_packed_examples_are_as_alone(model, params, CONFIG.vocab_size)


@pytest.mark.slow
def test_cached_steps_give_the_logits_of_the_full_pass():
    model, params = build()
    assert_steps_are_as_the_full_pass(model, params, CONFIG.vocab_size)


@pytest.mark.slow
def test_a_source_without_a_mask_is_all_tokens():
    plain = usual()(IDS, decoder_input_ids=IDS)
    for decoder_mask in (None, np.ones_like(IDS)):
        masked = usual()(IDS, np.ones_like(IDS), IDS, decoder_mask)
        np.testing.assert_allclose(plain, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_padding_of_the_source_does_not_reach_the_target():
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    logits, other = (usual()(ids, mask, IDS) for ids in (IDS, np.where(mask == 1, IDS, 0)))
    np.testing.assert_array_equal(logits, other)


@pytest.mark.slow
def test_without_target_ids_the_decoder_reads_the_shifted_source():
    shifted = np.pad(IDS, ((0, 0), (1, 0)))[:, :-1]
    alone, told = usual()(IDS), usual()(IDS, decoder_input_ids=shifted)
    np.testing.assert_allclose(alone, told, rtol=1e-5, atol=1e-5)


def test_later_calls_need_a_cache_that_has_seen_the_source():
    model, params = build()
    for nothing in (None, model.empty_cache(1, 4)):
        with pytest.raises(ValueError, match="input_ids are needed"):
            model.apply({"params": params}, decoder_input_ids=IDS[:1, :1], cache=nothing)


def test_shifted_labels_begin_with_the_first_id_and_ignored_labels_become_padding():
    config = dataclasses.replace(CONFIG, decoder_start_id=2, pad_id=1)
    labels = jnp.asarray([[4, 5, 6], [7, -100, -100]])
    assert decoder_inputs(config, labels).tolist() == [[2, 4, 5], [2, 7, 1]]


def test_the_decoder_begins_with_padding_where_no_id_is_given():
    config = dataclasses.replace(CONFIG, pad_id=9)
    assert decoder_inputs(config, jnp.asarray([[4, -100, 6]])).tolist() == [[9, 4, 9]]
    config = dataclasses.replace(config, decoder_start_id=8)
    assert decoder_inputs(config, jnp.asarray([[4, 5, 6]])).tolist() == [[8, 4, 5]]


def test_the_decoder_has_sizes_of_its_own():
    assert CONFIG.decoder.causal
    assert CONFIG.decoder.decoder == CONFIG.decoder
    _, params = build()
    layers = (params[side]["stack"]["layers"]["block_0"] for side in ("encoder", "decoder"))
    shapes = [
        (layer["mlp"]["up"]["kernel"].shape, layer["attention"]["query"]["kernel"].shape)
        for layer in layers
    ]
    assert shapes == [((2, 12, 10), (2, 12, 3, 4)), ((1, 12, 14), (1, 12, 2, 6))]


def test_a_decoder_like_the_encoder_is_spelled_in_one_way():
    same = dataclasses.replace(CONFIG, num_decoder_layers=2)
    assert same.num_decoder_layers is None
    assert dataclasses.replace(same, num_layers=5).decoder.num_layers == 5
    with pytest.raises(ValueError, match=r"model\.num_decoder_layers is 0"):
        dataclasses.replace(CONFIG, num_decoder_layers=0)
    with pytest.raises(ValueError, match=r"num_heads 5"):
        dataclasses.replace(CONFIG, num_decoder_heads=5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_there_is_a_table_for_each_use_that_is_not_shared(share, tie):
    _, params = build(share_embeddings=share, tie_embeddings=tie)
    assert ("decoder_words" in params) == (not share)
    assert ("lm_head" in params) == (not tie)


def test_an_encoder_that_looks_back_alone_is_refused():
    with pytest.raises(ValueError, match=r"model\.causal is True.*leave it out"):
        dataclasses.replace(CONFIG, causal=True)
    decoder = CONFIG.decoder
    assert (decoder.causal, decoder.num_layers, decoder.num_heads) == (True, 1, 2)
    assert decoder.decoder is decoder


@pytest.mark.parametrize("field", ["pad_id", "decoder_start_id"])
def test_an_id_beyond_the_vocabulary_is_refused(field):
    assert dataclasses.replace(CONFIG, **{field: 49}).decoder.vocab_size == 50
    with pytest.raises(ValueError, match=rf"model\.{field} is 50.*below 50"):
        dataclasses.replace(CONFIG, **{field: 50})


@pytest.mark.slow
def test_the_bias_of_the_logits_is_added_and_not_trained():
    head = LMHead(CONFIG, jnp.dtype(jnp.float32), use_bias=True, train_bias=False)
    words = token_table(CONFIG, jnp.dtype(jnp.float32)).bind(
        {"params": {"embedding": jnp.zeros((128, 12))}}
    )

    def logits(bias):
        return head.apply({"params": {"bias": bias}}, jnp.ones((1, 2, 12)), words).logits()

    found = logits(jnp.arange(128.0))
    np.testing.assert_array_equal(found[0, 1, :50], np.arange(50.0))
    assert np.all(found[..., 50:] == np.finfo(np.float32).min)
    assert not np.any(jax.grad(lambda bias: logits(bias).sum())(jnp.arange(128.0)))


@pytest.mark.slow
def test_scaled_tables_start_so_that_scaled_vectors_are_of_size_one():
    config = dataclasses.replace(CONFIG, scale_embeddings=True, vocab_size=2000)
    table = token_table(config, jnp.dtype(jnp.float32))
    boxed = table.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["embedding"]
    # Cut at two standard deviations, a normal has 0.88 of its own.
    assert np.std(boxed.value) * 12**0.5 == pytest.approx(0.88, rel=0.03)


@pytest.mark.slow
def test_a_classifier_looks_at_the_last_end_of_sequence():
    model, params = build(EncoderDecoderForSequenceClassification, eos_ids=(7,))
    states = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 12)), jnp.float32)
    ids = jnp.asarray([[7, 2, 7, 3], [7, 1, 1, 1], [1, 1, 1, 7]])

    def classify(states, ids):
        return model.apply({"params": params}, states, ids, method="classify")

    logits = classify(states, ids)
    chosen = states[jnp.arange(3), jnp.asarray([2, 0, 3])][:, None]
    np.testing.assert_allclose(logits, classify(chosen, jnp.full((3, 1), 7)), rtol=1e-5)
    assert logits.shape == (3, 2)
