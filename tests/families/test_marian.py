"""Marian against Hugging Face's, through tests/golden/marian.npz; the Transformer of 2017."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.marian import (
    SIZES,
    MarianConfig,
    from_huggingface,
    positions,
    settle,
    sinusoidal_table,
    to_huggingface,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.models.config import ComputeConfig
from flax_transformers.testing import assert_bit_equal
from tests.families.parity import (
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
    load_case,
)
from tests.golden import marian as golden
from tests.huggingface.tensors import drawn_parameters, parameter_shapes
from tests.models.encoder_decoders import assert_steps_are_as_the_full_pass

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)
TINY = MarianConfig(
    vocab_size=50,
    hidden_size=12,
    num_layers=1,
    num_heads=3,
    intermediate_size=8,
    max_positions=16,
)


@pytest.mark.slow
@pytest.mark.full
def test_cached_steps_give_the_logits_of_the_full_pass():
    config, model, params, _ = load_case(CASES["marian"])
    assert_steps_are_as_the_full_pass(model, params, config.vocab_size)


@pytest.mark.slow
def test_pre_norm_and_learned_positions_are_options():
    plain = parameter_shapes(build_model(TINY, ComputeConfig()))
    assert set(plain["encoder"]) == {"stack"}
    ours = dataclasses.replace(TINY, norm_position="pre", sinusoidal=False)
    shapes = parameter_shapes(build_model(ours, ComputeConfig()))
    assert set(shapes["encoder"]) == set(shapes["decoder"]) == {"embeddings", "norm", "stack"}


@pytest.mark.slow
@pytest.mark.parametrize("key_heads", [3, 1])
def test_values_may_have_another_width_than_keys(key_heads):
    ours = dataclasses.replace(
        TINY, head_dim=5, value_head_dim=7, num_key_value_heads=key_heads, init_std=0.3
    )
    model = build_model(ours, ComputeConfig())
    params = drawn_parameters(model, parameter_shapes(model))
    attention = params["decoder"]["stack"]["layers"]["block_0"]["cross_attention"]
    assert attention["query"]["kernel"].shape[-2:] == (3, 5)
    assert attention["value"]["kernel"].shape[-2:] == (key_heads, 7)
    assert attention["output"]["kernel"].shape[-3:-1] == (3, 7)
    assert ours.attention_width == 3 * (5 + 7) // 2
    assert_steps_are_as_the_full_pass(model, params, ours.vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("millions", "changes"),
    [
        (65, {}),
        (65, {"num_heads": 1}),
        (65, {"num_heads": 32}),
        (58, {"head_dim": 16, "value_head_dim": 64}),
        (60, {"head_dim": 32, "value_head_dim": 64}),
        (36, {"num_layers": 2}),
        (50, {"num_layers": 4}),
        (80, {"num_layers": 8}),
        (28, {"hidden_size": 256, "head_dim": 32}),
        (168, {"hidden_size": 1024, "head_dim": 128}),
        (53, {"intermediate_size": 1024}),
        (90, {"intermediate_size": 4096}),
    ],
)
def test_numbers_of_parameters_are_those_of_table_3(millions, changes):
    """The paper has "about 37,000" tokens, which would be 2 million parameters fewer for the base;
    with 41,000 all rows agree but that of the big model, 213 million, which is 214 with 37,000."""
    row = dataclasses.replace(SIZES["transformer-base"], vocab_size=41_000, **changes)
    assert round(count_parameters(row) / 1e6) == millions


def as_published(tensors):
    """The layout of Helsinki-NLP/opus-mt-en-de: the table four times, and computed positions."""
    names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    positions = np.ones((5, 30), np.float32)
    return (
        tensors
        | dict.fromkeys((*names, "lm_head.weight"), tensors["model.shared.weight"])
        | {f"model.{side}.embed_positions.weight": positions for side in ("encoder", "decoder")}
    )


@pytest.mark.slow
def test_published_layouts_are_read_as_the_freshly_saved_one():
    tensors = drawn_tensors(CASES["marian"])
    published = as_published(tensors)
    assert published.keys() != tensors.keys()
    assert_bit_equal(import_case(CASES["marian"], published), import_case(CASES["marian"], tensors))


@pytest.mark.slow
def test_the_constants_of_the_logits_are_read():
    params = import_case(CASES["marian"], tensors := drawn_tensors(CASES["marian"]))
    published = tensors["final_logits_bias"]
    assert published.shape == (1, CASES["marian"].config["vocab_size"])
    np.testing.assert_array_equal(params["lm_head"]["bias"][: published.size], published[0])


def test_two_vocabularies_have_tables_of_their_own_lengths():
    tensors = drawn_tensors(CASES["two_vocabularies"])
    rows = CASES["two_vocabularies"].config["vocab_size"]
    assert len(tensors["model.encoder.embed_tokens.weight"]) == rows
    assert len(tensors["model.decoder.embed_tokens.weight"]) == 37
    assert tensors["final_logits_bias"].shape == (1, 37)
    with pytest.raises(ValueError, match=r"model\.decoder_vocab_size is 40.*share_embeddings"):
        dataclasses.replace(TINY, decoder_vocab_size=40)


@pytest.mark.parametrize(("dtype", "difference"), [(np.float16, 4e-4), (np.float32, 1e-6)])
def test_positions_of_a_file_are_sines_and_cosines_to_its_precision(dtype, difference):
    table = sinusoidal_table(16, 12)
    name = "model.encoder.embed_positions.weight"
    assert settle(TINY, {name: (table + difference).astype(dtype)}) is TINY
    with pytest.raises(UserError, match=f"{name} holds other positions"):
        settle(TINY, {name: (table + 4 * difference).astype(dtype)})


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    theirs = dict(CASES[name].config)
    written = config_json(from_huggingface(theirs))
    if theirs["activation_function"] == "swish":
        theirs["activation_function"] = "silu"  # one function; the first of its names is written
    assert written.items() >= theirs.items()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "MarianModel", "scale_embeddings": False, "num_decoder_layers": 3},
        {"share_embeddings": False, "decoder_vocab_size": 44, "activation": "silu"},
        {"share_embeddings": False, "tie_embeddings": False, "pad_id": 49},
    ],
)
def test_the_configuration_survives_the_way_out_and_back(changes):
    ours = dataclasses.replace(TINY, **changes)
    assert from_huggingface(to_huggingface(ours)) == ours


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_position", "pre"), ("sinusoidal", False), ("gated", True), ("value_head_dim", 5)],
)
def test_a_model_that_marian_cannot_be_is_not_written(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(TINY, **{field: value}))


def test_sinusoids_are_sines_then_cosines_from_one_radian_down():
    table = sinusoidal_table(50, 8)
    assert table.dtype == np.float32
    for position in (0, 1, 49):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            assert math.isclose(table[position, i], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[position, 4 + i], math.cos(angle), abs_tol=1e-6)


def test_an_odd_width_ends_in_a_column_of_zeros():
    table = sinusoidal_table(4, 5)
    assert table.shape == (4, 5)
    assert not table[:, 4].any()
    assert table[0].tolist() == [0, 0, 1, 1, 0]


def test_positions_are_added_to_the_words_and_are_nan_beyond_the_last():
    sinusoids = positions(TINY, jnp.dtype(jnp.float32))
    last = TINY.max_positions
    found = sinusoids.apply({}, jnp.array([[0, last - 1, last]]))
    np.testing.assert_array_equal(found[0, :2], sinusoidal_table(last, 12)[[0, last - 1]])
    assert np.isnan(found[0, 2]).all()


def test_a_published_file_with_the_dropout_of_a_classifier_is_read():
    assert from_huggingface({"classifier_dropout": 0.0}).classifier_dropout == 0.0


def test_padding_is_in_the_vocabulary_of_the_decoder():
    two = dataclasses.replace(TINY, share_embeddings=False, decoder_vocab_size=60, pad_id=59)
    assert two.decoder.vocab_size == 60
    with pytest.raises(ValueError, match=r"model\.pad_id is 59.*below 58"):
        dataclasses.replace(two, decoder_vocab_size=58)


def test_fields_that_files_leave_out_are_those_of_the_format():
    config = from_huggingface({"model_type": "marian"})
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (58101, 1024, 12)
    assert (config.activation, config.scale_embeddings, config.pad_id) == ("gelu", False, 58100)


# Parameters of MarianMTModel; the constants added to the logits are none. The paper rounds those of
# its two models to 65 and 213 million.
PUBLISHED = {
    "transformer-base": 63_082_496,
    "transformer-big": 214_245_376,
    "opus-mt-en-de": 73_886_208,
    "opus-mt-en-fr": 74_609_664,
    "opus-mt-en-es": 77_419_008,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) - SIZES[name].vocab_size == PUBLISHED[name]
