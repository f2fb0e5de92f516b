"""SigLIP: its configuration and sizes; tests/golden/siglip.npz has its outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_transformers import load_pretrained, save_pretrained
from flax_transformers.errors import UserError
from flax_transformers.families.siglip import (
    SIZES,
    SiglipConfig,
    SiglipVision,
    from_huggingface,
)
from flax_transformers.huggingface.family import config_json, family_of_json
from tests.families.parity import (
    assert_parity,
    assert_weights_come_back,
    count_parameters,
    first_by_default,
    first_of_each_by_default,
    load_case,
)
from tests.golden import siglip as golden


@pytest.mark.slow
@pytest.mark.full
def test_layers_that_are_written_out_compute_the_same():
    assert_parity(golden.PLAIN, golden.__file__, scan_layers=False)


def test_the_configuration_survives_the_way_out_and_back():
    for case in golden.PAIRS:
        config = from_huggingface(case.config)
        assert from_huggingface(config_json(config)) == config
    assert from_huggingface({"text_config": {}, "vision_config": {}}) == SIZES["siglip-b16"]
    ours = SiglipConfig(
        vocab_size=50,
        hidden_size=6,
        num_layers=1,
        num_heads=3,
        intermediate_size=5,
        max_positions=9,
        attention_dropout=0.125,
        pad_id=0,
        eos_ids=(7,),
        vision=SiglipVision(
            hidden_size=8, num_layers=2, num_heads=2, intermediate_size=9, patch_size=8
        ),
    )
    assert from_huggingface(config_json(ours)) == ours


def test_the_configuration_of_an_encoder_alone_survives_the_way_out_and_back():
    for case in golden.TOWERS:
        read = family_of_json(case.config).from_huggingface
        config = read(case.config)
        assert read(config_json(config)) == config
        assert config_json(config)["model_type"] == case.config["model_type"]
    without = {"model_type": "siglip_vision_model", "vision_use_head": False}
    with pytest.raises(UserError, match="vision_use_head"):
        family_of_json(without).from_huggingface(without)
    narrow = {"model_type": "siglip_text_model", "hidden_size": 24}
    assert family_of_json(narrow).from_huggingface(narrow).projection_size == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    first_of_each_by_default({case.name: case.config["model_type"] for case in golden.TOWERS}),
)
def test_an_encoder_alone_computes_what_the_original_does(name):
    case = next(case for case in golden.TOWERS if case.name == name)
    assert_parity(case, golden.__file__)
    assert_weights_come_back(case)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("vision_config", {"vision_use_head": False}, "vision_use_head"),
        ("text_config", {"projection_size": 5}, "projection_size 5"),
        ("text_config", {"hidden_act": "elu"}, "activation 'elu'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(part, fields, message):
    with pytest.raises(UserError, match=message):
        from_huggingface({part: fields})


def test_there_is_no_class_token():
    with pytest.raises(ValueError, match=r"model\.vision\.pooling is 'class'"):
        replace(SiglipVision(), pooling="class")


def test_scale_and_bias_start_at_ten():
    _, _, params, _ = load_case(golden.PLAIN)
    assert params["logit_scale"]["scale"].shape == params["logit_bias"]["bias"].shape == (1,)
    assert math.exp(SiglipConfig().initial_logit_scale) == pytest.approx(10.0)


PUBLISHED = {
    "siglip-b16": 203_155_970,
    "siglip-b16-256": 203_202_050,
    "siglip-l16-256": 652_150_786,
    "siglip-so400m14": 877_415_602,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


@pytest.mark.slow
def test_the_folder_of_both_encoders_is_read_as_one(tmp_path):
    _, model, params, _ = load_case(golden.PLAIN)
    save_pretrained(tmp_path, model, params)
    image, text = "SiglipForImageClassification", "SiglipTextForSequenceClassification"
    for architecture, tower in ((image, "image"), (text, "text"), ("SiglipVisionModel", "image")):
        read, own = load_pretrained(tmp_path, architecture=architecture)
        assert read.config.architecture == architecture
        expected = params[f"{tower}_tower"]
        jax.tree.map(np.testing.assert_array_equal, {k: own[k] for k in expected}, expected)
        assert ("image_head" in own) == (architecture == "SiglipVisionModel")


def test_the_head_of_a_classifiers_encoder_may_be_absent_or_not():
    described = golden.CLASSIFIER.config
    read = family_of_json(described).from_huggingface
    without = {**described["vision_config"], "vision_use_head": False}
    assert read(described) == read({**described, "vision_config": without})
    assert config_json(read(described))["vision_config"]["vision_use_head"] is False
    with pytest.raises(UserError, match="vision_use_head"):
        read({**described, "vision_config": {**without, "vision_use_head": None}})
