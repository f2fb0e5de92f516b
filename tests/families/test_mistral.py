"""Mistral against Hugging Face's, through tests/golden/mistral.npz; its window and its sizes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.mistral import JSON, SIZES, MistralConfig
from flax_transformers.huggingface.family import config_json
from tests.families.parity import (
    count_parameters,
    first_by_default,
    load_case,
)
from tests.golden import mistral as golden

CASES = {case.name: case for case in golden.CASES}
EACH = pytest.mark.parametrize("name", CASES)


@pytest.mark.slow
def test_a_token_reaches_back_one_less_than_the_window_in_each_layer():
    case = CASES["mistral_window"]
    config, model, params, _ = load_case(case)
    ids = np.arange(1, 31, dtype=np.int32)[None]
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids).logits)
    changed = ids.copy()
    changed[0, 4] = 31
    seen = np.flatnonzero((apply(ids) != apply(changed)).any(-1)[0])
    reach = config.num_layers * (config.sliding_window - 1)
    assert config.sliding_window == 5 and reach < 25
    np.testing.assert_array_equal(seen, np.arange(4, 4 + reach + 1))


@EACH
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    written = config_json(config)
    assert JSON.read(written) == config
    assert written["sliding_window"] == CASES[name].config["sliding_window"]


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert JSON.read({"model_type": "mistral"}) == MistralConfig()
    assert MistralConfig().sliding_window == 4096


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("sliding_window", 0, "sliding_window is 0"),
        ("sliding_window", "4096", "sliding_window '4096'"),
        ("model_type", "llama", "model_type 'llama'"),
        ("rope_scaling", {"type": "yarn"}, "'yarn'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


@pytest.mark.parametrize(("field", "value"), [("qkv_bias", True), ("mlp_bias", True)])
def test_a_model_that_hugging_face_has_no_mistral_for_is_not_written(field, value):
    with pytest.raises(UserError, match=f"model.{field} is {value!r}.*checkpoint format"):
        config_json(MistralConfig(**{field: value}))


PUBLISHED = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]
