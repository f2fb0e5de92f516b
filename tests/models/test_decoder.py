"""Decoders: one token after another over a cache is the same as all at once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig, TextConfig
from flax_transformers.models.decoder import DecoderForCausalLM, DecoderForSequenceClassification
from flax_transformers.models.heads import last_token
from flax_transformers.testing import relative_difference, tiny_bert
from tests.families.parity import first_by_default, load_case, some_by_default
from tests.golden import cohere, gemma, gemma2, gpt2, llama, mistral, mixtral, olmo2, qwen2, qwen3
from tests.huggingface.tensors import drawn_model, drawn_parameters, parameter_shapes

NAMES = (
    "gpt2_usual",
    "llama_tied",  # positions scaled linearly
    "llama_scaled",  # by frequency
    "mistral_window",
    "mixtral_two",
    "gemma_tied",
    "gemma2_usual",  # bounded scores, alternating windows
    "qwen2_yarn",
    "qwen3_usual",
    "olmo2_usual",
    "cohere_plus",
)
CASES = {
    case.name: case
    for family in (gpt2, llama, mistral, mixtral, gemma, gemma2, qwen2, qwen3, olmo2, cohere)
    for case in family.CASES
    if case.name in NAMES
}
ONE_BY_ONE = (1,) * 13
CHUNKS = {"in three": (6, 1, 6), "one by one": ONE_BY_ONE, "six first": (6, *(1,) * 7)}


@cache
def load(name):
    """The model of a golden case and its forward pass, compiled, taking a cache or None.

    Without the bound of logits, each by itself: here they are many times larger than a bound
    of 0.7, relative to which rounding would be as much larger.
    """
    _, model, params, _ = load_case(CASES[name])
    if model.config.logit_softcap is not None:
        model = build_model(replace(model.config, logit_softcap=None))
    return model, jax.jit(partial(model.apply, {"params": params}))


def stepwise(name, inputs, chunks, slots=13):
    """Logits of the rows fed in ``chunks``, everything of them cut alike."""
    model, apply = load(name)
    cache = model.empty_cache(5, slots)
    logits, start = [], 0
    for length in chunks:
        part = {key: value[:, start : start + length] for key, value in inputs.items()}
        output = apply(**part, cache=cache)
        logits.append(output.logits)
        cache, start = output.cache, start + length
    assert int(cache.index) == sum(chunks)
    return np.concatenate(logits, axis=1)


def assert_stepwise(name, inputs, chunks, **more):
    found, mask = stepwise(name, inputs, chunks, **more), inputs["attention_mask"] == 1
    whole = np.asarray(load(name)[1](**inputs).logits)
    assert relative_difference(found[mask], whole[mask]) < 1e-5


def counted(inputs):
    """Positions over tokens alone."""
    mask = inputs["attention_mask"]
    return {**inputs, "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)}


def plain(inputs):
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.slow
@pytest.mark.parametrize("chunks", first_by_default(CHUNKS.values()), ids=CHUNKS)
@pytest.mark.parametrize("name", some_by_default(CASES, ["gemma2_usual"]))
def test_sequences_decoded_in_chunks_have_the_logits_of_the_full_pass(name, chunks):
    assert_stepwise(name, plain(CASES[name].inputs), chunks)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(["mistral_window", "llama_scaled"]))
def test_positions_may_be_given_and_slots_left_over(name):
    assert_stepwise(name, counted(plain(CASES[name].inputs)), CHUNKS["in three"], slots=17)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(["gpt2_usual", "llama_scaled", "mistral_window"]))
def test_tokens_after_padding_go_on_as_if_it_were_not_there(name):
    """Rows of six tokens, three places of padding after them, then seven tokens more."""
    ids = CASES[name].inputs["input_ids"][:, :13].copy()
    ids[ids == 0] = 7
    tight = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    gap = np.zeros((5, 3), np.int32)
    loose = counted(
        {
            key: np.concatenate([value[:, :6], gap, value[:, 6:]], axis=1)
            for key, value in tight.items()
        }
    )
    found = stepwise(name, loose, (9, *(1,) * 7), slots=16)
    whole = np.asarray(load(name)[1](**counted(tight)).logits)
    kept = np.r_[0:6, 9:16]
    assert relative_difference(found[:, kept], whole) < 1e-5


TINY = TextConfig(
    architecture="Tiny",
    vocab_size=11,
    hidden_size=6,
    num_layers=2,
    num_heads=3,
    intermediate_size=5,
    max_positions=8,
    causal=True,
)
IDS = np.array([[1, 2, 3, 4, 5]], np.int32)


@pytest.mark.slow
def test_no_token_sees_a_later_one():
    model = DecoderForCausalLM(TINY, ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids).logits)
    before, after = apply(IDS), apply(np.array([[1, 2, 3, 9, 5]], np.int32))
    same = np.asarray(before == after).all(axis=-1)[0]
    assert same.tolist() == [True, True, True, False, False]


@pytest.mark.slow
def test_padded_vocabulary_entries_have_the_lowest_logits():
    model = DecoderForCausalLM(replace(TINY, tie_embeddings=False), ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    unembed = jax.jit(partial(model.apply, method="unembed"))
    logits = np.asarray(unembed({"params": params}, jnp.ones((1, 2, 6))))
    assert logits.shape == (1, 2, 128)
    assert (logits[..., 11:] == jnp.finfo(jnp.float32).min).all()
    assert (logits[..., :11] > -1e3).all()


@pytest.mark.parametrize(
    ("mask", "place"),
    [([1, 1, 1, 1, 1], 4), ([1, 1, 1, 0, 0], 2), ([0, 0, 1, 1, 1], 4), ([0, 1, 0, 0, 0], 1)],
)
def test_the_last_token_of_a_row_is_found_on_either_side_of_padding(mask, place):
    assert last_token(jnp.array([mask])).tolist() == [place]


@pytest.mark.slow
def test_a_row_is_labelled_by_its_last_token():
    model = DecoderForSequenceClassification(replace(TINY, num_labels=3), ComputeConfig())
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 6))
    params = drawn_parameters(model, parameter_shapes(model))
    classify = jax.jit(partial(model.apply, {"params": params}, hidden, IDS, method="classify"))
    kernel = np.asarray(params["classification_head"]["kernel"])
    mask = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    expected = np.stack([hidden[0, 1], hidden[1, 4]]) @ kernel
    np.testing.assert_allclose(classify(mask), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(classify(), hidden[:, 4] @ kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_token_too_many_for_the_cache_makes_nan_and_many_at_once_are_refused():
    inputs = plain(CASES["llama_tied"].inputs)
    logits = stepwise("llama_tied", inputs, (6, 1, 6), slots=12)
    assert np.isfinite(logits[:, :7]).all() and np.isnan(logits[:, 7:]).all()
    with pytest.raises(UserError, match="13 tokens do not fit into a cache of 12 slots"):
        stepwise("llama_tied", inputs, (13,), slots=12)


def test_an_encoder_takes_no_cache():
    model = build_model(tiny_bert(), ComputeConfig())
    ids = np.ones((1, 2), np.int32)
    cache = jax.eval_shape(lambda: model.empty_cache(1, 4))
    with pytest.raises(UserError, match="a cache needs a causal model"):
        jax.eval_shape(lambda key: model.init(key, ids, cache=cache), jax.random.key(0))


@pytest.mark.slow
def test_a_row_classifier_finds_its_last_token_by_mask_by_segments_or_by_the_id_of_padding():
    model, params = drawn_model("LlamaForSequenceClassification", pad_id=0)
    ids = np.array([[5, 3, 7, 0, 0], [4, 9, 2, 6, 0]], np.int32)
    mask = (ids != 0).astype(np.int32)
    apply = jax.jit(lambda **inputs: model.apply({"params": params}, ids, **inputs).logits)
    expected = apply(attention_mask=mask)
    np.testing.assert_array_equal(apply(segment_ids=mask), expected)
    np.testing.assert_allclose(apply(), expected, rtol=1e-5, atol=1e-7)
    assert np.abs(expected - apply(attention_mask=np.ones_like(ids))).max() > 1e-4
