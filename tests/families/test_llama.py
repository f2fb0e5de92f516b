"""Llama against Hugging Face's, through tests/golden/llama.npz; its configuration and sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.families.llama import JSON, SIZES, LlamaConfig
from flax_transformers.huggingface.family import config_json
from flax_transformers.models.config import Rope
from flax_transformers.testing import assert_bit_equal
from tests.families.decoders import assert_gradients
from tests.families.parity import (
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
)
from tests.golden import llama as golden
from tests.huggingface.tensors import drawn_model

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)


@pytest.mark.slow
@pytest.mark.parametrize("scan", first_by_default([True, False]), ids=["scanned", "unrolled"])
def test_the_gradients_of_the_loss_are_those_of_torch(scan):
    assert_gradients(golden.GRADIENTS, golden.__file__, scan_layers=scan)


def with_frequencies(tensors):
    """Files of 2023 carry the frequencies of each layer."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return tensors | {name.format(i): np.ones(4, np.float32) for i in range(2)}


def with_a_copy_of_the_words(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


@pytest.mark.parametrize("layout", [with_frequencies, with_a_copy_of_the_words])
def test_published_layouts_are_read_as_the_freshly_saved_one(layout):
    case = CASES["llama_tied"]
    tensors = drawn_tensors(case)
    assert_bit_equal(import_case(case, layout(tensors)), import_case(case, tensors))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_model_for_questions_may_come_with_the_prefix_of_the_others(prefix):
    case = CASES["llama_spans"]
    tensors = drawn_tensors(case)
    assert "transformer.layers.0.mlp.up_proj.weight" in tensors
    renamed = {n.replace("transformer.", prefix): tensor for n, tensor in tensors.items()}
    assert_bit_equal(import_case(case, renamed), import_case(case, tensors))


def test_the_other_models_may_come_with_the_prefix_of_the_one_for_questions():
    for name in ("llama_untied", "llama_old_scaled"):
        tensors = drawn_tensors(CASES[name])
        bare = {n.removeprefix("model."): tensor for n, tensor in tensors.items()}
        head = {"lm_head.weight"} & bare.keys()
        renamed = {n if n in head else f"transformer.{n}": tensor for n, tensor in bare.items()}
        assert_bit_equal(import_case(CASES[name], renamed), import_case(CASES[name], tensors))


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    assert JSON.read(config_json(config)) == config


def test_the_configuration_survives_the_way_out_and_back():
    ours = LlamaConfig(
        architecture="LlamaForTokenClassification",
        vocab_size=7,
        hidden_size=12,
        num_layers=1,
        num_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        intermediate_size=5,
        max_positions=9,
        norm_eps=0.5,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        attention_dropout=0.125,
        classifier_dropout=0.5,
        init_std=0.75,
        tie_embeddings=True,
        rope=Rope(theta=3.0, scaling="linear", factor=2.0),
        pad_id=2,
        bos_id=None,
        eos_ids=(3, 4),
        label_names=("no", "yes"),
    )
    assert JSON.read(config_json(ours)) == ours


def test_one_key_head_for_each_head_is_the_same_as_saying_nothing():
    explicit = LlamaConfig(num_heads=32, num_key_value_heads=32, head_dim=128)
    assert explicit == LlamaConfig()
    written = config_json(explicit)
    assert (written["num_key_value_heads"], written["head_dim"]) == (32, 128)


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert JSON.read({"model_type": "llama"}) == LlamaConfig()


LLAMA_3_1 = Rope(
    theta=5e5,
    scaling="llama3",
    factor=8.0,
    low_frequency_factor=1.0,
    high_frequency_factor=4.0,
    original_max_positions=64,
)
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WITHOUT_LENGTH = {name: SCALING[name] for name in list(SCALING)[:3]}


@pytest.mark.parametrize(
    ("spelt", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 7.0}, Rope(theta=7.0)),
        ({"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": None}, Rope(theta=7.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(theta=7.0)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            Rope(scaling="linear", factor=2.0),
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            Rope(theta=7.0, scaling="linear", factor=2.0),
        ),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}, LLAMA_3_1),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
            LLAMA_3_1,
        ),
        (
            {
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **WITHOUT_LENGTH},
                "max_position_embeddings": 64,
            },
            LLAMA_3_1,
        ),
        (
            {
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **WITHOUT_LENGTH},
                "original_max_position_embeddings": 64,
            },
            LLAMA_3_1,
        ),
    ],
)
def test_rotary_positions_are_read_in_every_spelling(spelt, rope):
    assert JSON.read(spelt).rope == rope


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("hidden_act", "elu", "activation 'elu'"),
        ("model_type", "cohere", "model_type 'cohere'"),
        ("num_key_value_heads", 5, "does not divide by model.num_key_value_heads 5"),
        ("num_key_value_heads", "8", "num_key_value_heads '8'"),
        ("head_dim", 1.5, "head_dim 1.5"),
        ("rope_scaling", {"type": "longrope", "factor": 2}, "'longrope'.*supported are 'default'"),
        ("rope_parameters", {"rope_type": "longrope", "factor": 2.0}, "'longrope'"),
        ("rope_parameters", {"rope_type": "longrope"}, "'longrope'"),
        ("rope_scaling", {"type": "linear"}, "factor None.*'linear'"),
        ("rope_scaling", {"type": "llama3", "factor": 2.0}, "low_freq_factor None"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("norm_position", "post"), ("gated", False), ("output_bias", True)]
)
def test_a_model_that_hugging_face_has_no_llama_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(LlamaConfig(), **{field: value}))


def test_a_classifier_starts_from_a_language_model_whose_head_is_not_tied(tmp_path, caplog):
    model, params = drawn_model("LlamaForCausalLM", tie_embeddings=False)
    ft.save_pretrained(tmp_path / "lm", model, params)
    _, found = ft.load_pretrained(
        tmp_path / "lm", architecture="LlamaForSequenceClassification", num_labels=1
    )
    tables = (one["words"]["embedding"][:96] for one in (found, params))  # without padding
    assert_bit_equal(*tables)
    assert "classification_head: newly initialised" in caplog.text


PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]
