"""GPT-2 against Hugging Face's, through tests/golden/gpt2.npz; its configuration and sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.gpt2 import SIZES, GPT2Config, from_huggingface
from flax_transformers.huggingface.family import config_json
from flax_transformers.testing import assert_bit_equal
from tests.families.decoders import assert_gradients
from tests.families.parity import (
    count_parameters,
    drawn_tensors,
    first_by_default,
    import_case,
)
from tests.golden import gpt2 as golden

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)


@pytest.mark.slow
@pytest.mark.full
def test_the_gradients_of_the_loss_are_those_of_torch():
    assert_gradients(golden.GRADIENTS, golden.__file__)


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def as_published(tensors):
    """The layout of gpt2: no prefix, and in each layer the causal mask of 1024 places."""
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 30, 30), np.float32) for i in range(2)}
    return without_prefix(tensors) | masks | {"h.0.attn.masked_bias": np.float32(-1e4)}


def with_a_copy_of_the_words(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [without_prefix, as_published, with_a_copy_of_the_words])
def test_published_layouts_are_read_as_the_freshly_saved_one(layout):
    case = CASES["gpt2_usual"]
    tensors = drawn_tensors(case)
    assert_bit_equal(import_case(case, layout(tensors)), import_case(case, tensors))


@pytest.mark.slow
def test_a_model_without_heads_may_come_with_a_prefix():
    case = CASES["gpt2_gelu"]
    tensors = drawn_tensors(case)
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    assert_bit_equal(import_case(case, prefixed), import_case(case, tensors))


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    config = from_huggingface(CASES[name].config)
    written = config_json(config)
    assert from_huggingface(written) == config
    unnamed = {key: v for key, v in CASES[name].config.items() if key != "num_labels"}
    assert written.items() >= unnamed.items()


def test_the_configuration_survives_the_way_out_and_back():
    ours = GPT2Config(
        architecture="GPT2ForTokenClassification",
        vocab_size=7,
        hidden_size=6,
        num_layers=1,
        num_heads=3,
        intermediate_size=5,
        max_positions=9,
        norm_eps=0.5,
        activation="silu",
        dropout=0.25,
        attention_dropout=0.125,
        classifier_dropout=0.5,
        init_std=0.75,
        tie_embeddings=False,
        pad_id=2,
        bos_id=None,
        eos_ids=(3, 4),
        label_names=("no", "yes"),
    )
    assert from_huggingface(config_json(ours)) == ours


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert from_huggingface({"model_type": "gpt2"}) == SIZES["gpt2"] == GPT2Config()


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("activation_function", "elu", "activation 'elu'"),
        ("scale_attn_weights", False, "scale_attn_weights False"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx True"),
        ("reorder_and_upcast_attn", True, "reorder_and_upcast_attn True"),
        ("add_cross_attention", True, "add_cross_attention True"),
        ("model_type", "gptj", "model_type 'gptj'"),
        ("n_inner", "4", "n_inner '4'"),
        ("n_head", 5, "does not divide by model.num_heads 5"),
        ("eos_token_id", "end", "eos_token_id 'end'; it must be"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface({field: value})


@pytest.mark.parametrize(("field", "value"), [("norm_position", "post"), ("norm", "rms")])
def test_a_model_that_hugging_face_has_no_gpt2_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(dataclasses.replace(GPT2Config(), **{field: value}))


# The paper states 117M, 345M, 762M and 1542M, which are not what the published files hold.
PUBLISHED = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]
