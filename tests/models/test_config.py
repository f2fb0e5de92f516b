"""What a model's description refuses and derives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig, Rope, TextConfig, TransformerConfig

LAYERS = {"hidden_size": 6, "num_layers": 1, "num_heads": 3, "intermediate_size": 5}
SIZES = LAYERS | {"vocab_size": 130, "max_positions": 8}


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (30522, 30592)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(size, padded):
    assert TextConfig(**SIZES | {"vocab_size": size}).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("num_heads", 4, "hidden_size 6 does not divide by model.num_heads 4"),
        *((name, 0, f"model.{name} is 0; it must be at least 1") for name in SIZES),
        ("num_labels", 0, "model.num_labels is 0"),
        ("num_key_value_heads", 2, "num_heads 3 does not divide by model.num_key_value_heads 2"),
        ("num_key_value_heads", 0, "model.num_key_value_heads is 0; it must be at least 1"),
        ("dropout", 1.0, r"model.dropout is 1.0; it must be in \[0, 1\)"),
        ("attention_dropout", -0.1, "model.attention_dropout is -0.1"),
        ("activation_dropout", 1.5, "model.activation_dropout is 1.5"),
        ("norm_eps", -1.0, "model.norm_eps is -1.0"),
        ("init_std", -1.0, "model.init_std is -1.0"),
        ("token_types", -1, "model.token_types is -1"),
        ("max_positions", None, "max_positions is None, but positions are learned"),
        ("label_names", ("a", "b", "c"), "label_names has 3 names, but model.num_labels is 2"),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_name(field, value, names):
    with pytest.raises(ValueError, match=names):
        TextConfig(**SIZES | {field: value})


def test_a_head_is_its_share_of_the_width_unless_its_width_is_given():
    assert TransformerConfig(**LAYERS).head_width == 2
    assert TransformerConfig(**LAYERS, head_dim=5).head_width == 5
    # Then the heads need not divide the width.
    assert TransformerConfig(**LAYERS | {"num_heads": 4}, head_dim=5).head_width == 5


def test_each_query_head_has_its_own_keys_unless_fewer_are_asked_for():
    assert TransformerConfig(**LAYERS).kv_heads == 3
    assert TransformerConfig(**LAYERS, num_key_value_heads=1).kv_heads == 1


def test_a_classifier_drops_as_the_model_does_unless_told_otherwise():
    assert TransformerConfig(**LAYERS, dropout=0.1).head_dropout == 0.1
    assert TransformerConfig(**LAYERS, dropout=0.1, classifier_dropout=0.0).head_dropout == 0.0


def test_output_projections_start_smaller_the_deeper_the_model_if_so_asked():
    deep = LAYERS | {"num_layers": 8, "init_std": 0.02}
    assert TransformerConfig(**deep).residual_init_std == 0.02
    assert TransformerConfig(**deep, scaled_residual_init=True).residual_init_std == 0.005


def test_the_automatic_dtype_is_float32_on_cpu_and_bfloat16_elsewhere():
    dtypes = [ComputeConfig(dtype="auto").resolve(p).dtype for p in ("cpu", "gpu", "tpu")]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]
    assert ComputeConfig(dtype="bfloat16").resolve("cpu").dtype == "bfloat16"


def test_each_platform_has_kernels_of_its_own_for_attention():
    found = [ComputeConfig().resolve(platform).attention for platform in ("cpu", "gpu", "tpu")]
    assert found == ["xla", "cudnn or xla", "splash or xla"]
    assert ComputeConfig(attention="splash").resolve("tpu").attention == "splash"
    with pytest.raises(UserError, match="attention is 'cudnn', which is not available on tpu"):
        ComputeConfig(attention="cudnn").resolve("tpu")


def test_a_config_of_no_family_builds_no_model():
    with pytest.raises(UserError, match="TextConfig is the config of no family"):
        build_model(TextConfig(**SIZES), ComputeConfig())


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (Rope(scaling="linear", factor=4.0), 256),
        (Rope(scaling="yarn", factor=4.0, original_max_positions=64), 256),
        (Rope(scaling="yarn", factor=4.0, original_max_positions=16), 64),
        (Rope(scaling="llama3", factor=4.0, original_max_positions=64), 64),
        (Rope(scaling="dynamic", factor=4.0, original_max_positions=64), None),
        (Rope(), 64),
        (None, 64),
    ],
)
def test_scaled_rotary_positions_extend_the_longest_sequence(rope, limit):
    config = TextConfig(**SIZES | {"positions": "none", "rope": rope, "max_positions": 64})
    assert config.length_limit == config.input_limits()["input_ids"].length == limit
    assert replace(config, max_positions=None).length_limit is None
    assert replace(config, positions="learned").length_limit == 64  # the rows of its table


@pytest.mark.parametrize("sizes", [{"head_dim": 1}, {"hidden_size": 9}])
def test_rotary_positions_need_heads_of_an_even_width(sizes):
    with pytest.raises(
        UserError, match="heads are . wide, but rotary positions need an even width"
    ):
        TextConfig(**SIZES | {"positions": "none", "rope": Rope()} | sizes)
    TextConfig(**SIZES | {"positions": "none"} | sizes)
