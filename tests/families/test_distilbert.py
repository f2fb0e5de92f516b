"""DistilBERT against Hugging Face's, through tests/golden/distilbert.npz; its configuration."""

from __future__ import annotations

import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.distilbert import JSON, SIZES, DistilBertConfig
from flax_transformers.huggingface.family import config_json
from tests.families.parity import count_parameters, first_by_default
from tests.golden import distilbert as golden

CASES = {case.name: case for case in golden.CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    assert JSON.read(config_json(config)) == config


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert JSON.read({"model_type": "distilbert"}) == DistilBertConfig()
    assert JSON.read({"hidden_size": 24, "num_attention_heads": 3}).hidden_size == 24


PUBLISHED = {
    "distilbert-base": 66_985_530,
    "distilbert-base-cased": 65_812_036,
    "distilbert-base-multilingual-cased": 135_445_755,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("model_type", "bert", "model_type 'bert'"),
        ("activation", "tanh", "activation 'tanh'"),
        ("dim", "768", "dim '768'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


def test_token_types_cannot_be_written():
    with pytest.raises(UserError, match=r"model\.token_types is 2.*checkpoint format"):
        config_json(DistilBertConfig(token_types=2))
