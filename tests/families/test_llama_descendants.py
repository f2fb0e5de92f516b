"""Qwen 2 and 3, OLMo 2, Command R and Gemma 2: configs, sizes, and what is their own."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families import cohere, gemma2, llama, mistral, olmo2, qwen2, qwen3
from flax_transformers.families.llama import read_rope, write_rope
from flax_transformers.huggingface.family import config_json
from tests.families.parity import count_parameters, load_case
from tests.golden import cohere as cohere_golden
from tests.golden import gemma2 as gemma2_golden
from tests.golden import olmo2 as olmo2_golden
from tests.golden import qwen2 as qwen2_golden
from tests.golden import qwen3 as qwen3_golden

FAMILIES = {"qwen2": qwen2, "qwen3": qwen3, "olmo2": olmo2, "cohere": cohere, "gemma2": gemma2}
GOLDENS = (qwen2_golden, qwen3_golden, olmo2_golden, cohere_golden, gemma2_golden)
CASES = {case.name: case for golden in GOLDENS for case in golden.CASES}


def family_of(name):
    return FAMILIES[CASES[name].config["model_type"]]


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_the_way_in_and_out(name):
    read = family_of(name).FAMILY.from_huggingface
    config = read(CASES[name].config)
    assert read(config_json(config)) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_published_sizes_survive_it_too(name):
    for config in FAMILIES[name].SIZES.values():
        assert FAMILIES[name].FAMILY.from_huggingface(config_json(config)) == config


PUBLISHED = {
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "command-r": 34_980_831_232,
    "command-r-08-2024": 32_296_476_672,
    "command-r-plus": 103_810_674_688,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
}
SIZES = {name: config for family in FAMILIES.values() for name, config in family.SIZES.items()}
FIRST = {next(iter(family.SIZES)) for family in FAMILIES.values()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n not in FIRST)) for n in SIZES]
)
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("family", "field", "value", "names"),
    [
        (qwen2, "model_type", "qwen3", "model_type 'qwen3'"),
        (qwen2, "layer_types", ["sliding_attention"] * 32, "a window in the upper layers alone"),
        (qwen3, "attention_bias", "no", "attention_bias 'no'"),
        (olmo2, "rope_scaling", {"type": "yarn"}, "factor None.*'yarn'"),
        (cohere, "logit_scale", "1", "logit_scale '1'"),
        (gemma2, "layer_types", ["full_attention"] * 26, "with and without a window in turn"),
        (gemma2, "use_bidirectional_attention", True, "use_bidirectional_attention True"),
        (gemma2, "attn_logit_softcapping", "50", "attn_logit_softcapping '50'"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(family, field, value, names):
    with pytest.raises(UserError, match=names):
        family.FAMILY.from_huggingface({field: value})


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        (qwen2, {"sliding_window": 7, "full_layers": 2}, (None, None, 7)),
        (qwen2, {"sliding_window": 7, "full_layers": 3}, (None, None, None)),
        (qwen3, {"sliding_window": 7}, (7, 7, 7)),
        (gemma2, {"sliding_window": 5}, (5, None, 5)),
    ],
)
def test_layers_have_the_windows_of_the_originals(family, changes, windows):
    config = next(iter(family.SIZES.values()))
    config = dataclasses.replace(config, num_layers=3, **changes)
    assert config.windows == windows
    assert family.FAMILY.from_huggingface(config_json(config)).windows == windows


def test_heads_of_qwen3_are_128_wide_where_the_file_does_not_say():
    read = qwen3.FAMILY.from_huggingface
    small = {"hidden_size": 1024, "num_attention_heads": 16}
    assert read(small).head_width == 128 == read({}).head_width
    assert read(small | {"head_dim": 64}).head_width == 64


def test_a_gemma_without_a_window_is_not_written_and_an_equal_one_is():
    config = dataclasses.replace(gemma2.SIZES["gemma2-2b"], sliding_window=None)
    with pytest.raises(UserError, match="model.sliding_window is None, .*; set it to 8192, which"):
        config_json(config)
    assert config_json(dataclasses.replace(config, sliding_window=8192))["sliding_window"] == 8192


@pytest.mark.parametrize("family", [llama, gemma2, qwen2, mistral])
def test_a_width_that_the_heads_do_not_divide_is_written_where_transformers_takes_it(family):
    config = next(iter(family.SIZES.values()))
    config = dataclasses.replace(
        config, hidden_size=20, num_heads=3, num_key_value_heads=3, head_dim=8
    )
    if family in (llama, gemma2):
        with pytest.raises(UserError, match="hidden_size 20 does not divide by model.num_heads 3"):
            config_json(config)
    else:
        assert config_json(config)["hidden_size"] == 20


def test_bounded_logits_stay_within_the_bound():
    case = CASES["gemma2_usual"]
    _, model, params, _ = load_case(case)
    large = jax.tree.map(lambda leaf: 30 * leaf, params)
    logits = np.asarray(jax.jit(model.apply)({"params": large}, case.inputs["input_ids"]).logits)
    bound = case.config["final_logit_softcapping"]
    assert bound * 0.9 < np.abs(logits).max() <= bound


@pytest.mark.parametrize(
    "given",
    [
        {"factor": 4.0, "original_max_position_embeddings": 1024},
        {"original_max_position_embeddings": 1024},  # the factor is 4096 / 1024
        {"factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 1.0,
         "mscale_all_dim": 0.5},
    ],
)  # fmt: skip
def test_rotary_positions_of_yarn_survive_the_way_in_and_out(given):
    rope = read_rope({"rope_scaling": {"rope_type": "yarn", **given}}, 1e4, 4096)
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 1024)
    assert read_rope(write_rope(rope), 1e4, 4096) == rope
