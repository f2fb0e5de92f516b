"""DeBERTa-v2 and v3 against Hugging Face's, through tests/golden/deberta_v2.npz; its positions."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.deberta_v2 import (
    SIZES,
    DebertaV2Config,
    from_huggingface,
    relative_rows,
    shifted,
)
from flax_transformers.huggingface.family import build_model, config_json
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.optim.selection import depths, logical_axes
from flax_transformers.testing import relative_difference, tiny_architecture
from tests.families.parity import count_parameters, first_by_default, import_case, load_case
from tests.golden import deberta_v2 as golden
from tests.huggingface.tensors import drawn_model, export_weights

CASES = {case.name: case for case in golden.CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_the_way_in_and_out(name):
    config = from_huggingface(CASES[name].config)
    assert from_huggingface(config_json(config)) == config


PUBLISHED = {
    "deberta-v3-base": 183_831_552,
    "deberta-v3-xsmall": 70_682_112,
    "deberta-v3-small": 141_304_320,
    "deberta-v3-large": 434_012_160,
    "mdeberta-v3-base": 278_218_752,
}
ROUNDED = {"deberta-v2-xlarge": 0.9e9, "deberta-v2-xxlarge": 1.5e9}


@pytest.mark.parametrize("name", first_by_default(PUBLISHED))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(replace(SIZES[name], architecture="DebertaV2Model")) == PUBLISHED[name]


@pytest.mark.parametrize("name", first_by_default(ROUNDED))
def test_sizes_of_version_2_have_the_number_of_parameters_of_the_paper(name):
    count = count_parameters(replace(SIZES[name], architecture="DebertaV2Model"))
    assert ROUNDED[name] == pytest.approx(count, rel=0.05)


V3_BASE = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 0,
    "vocab_size": 128100,
}
"""The config.json of microsoft/deberta-v3-base."""
V2_XLARGE = V3_BASE | {
    "attention_head_size": 64,
    "conv_act": "gelu",
    "conv_kernel_size": 3,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_attention_heads": 24,
    "num_hidden_layers": 24,
}
"""That of microsoft/deberta-v2-xlarge."""


def test_published_configs_are_read_and_written():
    for published, size in ((V3_BASE, "deberta-v3-base"), (V2_XLARGE, "deberta-v2-xlarge")):
        config = from_huggingface(published)
        assert config == SIZES[size]
        written = config_json(config)
        same = published.keys() - {"pos_att_type", "attention_head_size"}
        assert {name: written[name] for name in same} == {name: published[name] for name in same}


def test_fields_that_a_file_leaves_out_are_those_of_transformers():
    sizes = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"}
    kept = {name: value for name, value in V2_XLARGE.items() if name not in sizes | {"vocab_size"}}
    assert from_huggingface(kept) == SIZES["deberta-v2-xlarge"]
    for name in ("position_buckets", "pos_att_type", "conv_act", "conv_kernel_size"):
        kept.pop(name)
    config = from_huggingface(kept)
    assert (config.position_buckets, config.relative_span, config.position_terms) == (0, 512, ())
    assert config.conv_kernel_size == 0
    assert from_huggingface(kept | {"conv_kernel_size": 3}).conv_activation == "tanh"


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("model_type", "deberta", "model_type 'deberta'"),
        ("conv_kernel_size", 2, "conv_kernel_size is 2"),
        ("conv_groups", 2, "conv_groups 2"),
        ("attention_head_size", 32, "attention_head_size 32"),
        ("share_att_key", False, "share_att_key False"),
        ("pos_att_type", ["p2p"], r"pos_att_type \['p2p'\]"),
        ("position_buckets", "256", "position_buckets '256'"),
        ("embedding_size", 128, "embedding_size 128"),
        ("max_relative_positions", 100, "longest distance of 100"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface(V3_BASE | {field: value})


@pytest.mark.parametrize(
    "field", ["relative_attention", "share_att_key", "norm_rel_ebd", "position_biased_input"]
)
def test_a_file_that_leaves_out_what_makes_it_relative_is_refused(field):
    with pytest.raises(UserError, match=f"has no {field}, which means"):
        from_huggingface({name: value for name, value in V3_BASE.items() if name != field})


def test_rows_of_distances_are_exact_near_by_and_logarithmic_far_away():
    rows = relative_rows(600, 256, 256, 512) - 256
    near = rows[599 - 128 : 599 + 129]
    assert near.tolist() == list(range(-128, 129))
    assert rows[599 + 129] == 129 and rows[599 + 511] == 255
    assert (rows[:599] == -rows[:599:-1]).sum() >= 511
    assert (np.diff(rows) >= 0).all() and rows.min() == -256 and rows.max() == 255
    assert relative_rows(4, 3, 0, 3).tolist() == [0, 1, 2, 3, 4, 5, 5]


def test_shifting_takes_the_element_of_each_distance():
    length = 5
    x = np.arange(2 * 3 * length * 9).reshape(2, 3, length, 9)
    for t in range(length):
        for s in range(length):
            expected = x[:, :, t, s - t + length - 1]
            np.testing.assert_array_equal(shifted(jnp.asarray(x))[:, :, t, s], expected)
    assert shifted(jnp.ones((1, 1, 1, 1))).shape == (1, 1, 1, 1)


@pytest.mark.slow
def test_packed_examples_do_not_see_each_other():
    model, params = drawn_model(
        "DebertaV2Model", position_buckets=8, max_relative_positions=20, conv_kernel_size=5
    )
    ids = np.array([[5, 9, 7, 3, 11, 2, 8], [5, 9, 7, 0, 0, 0, 0], [3, 11, 2, 8, 0, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
    output = jax.jit(model.apply)({"params": params}, ids, segment_ids=segments)
    packed, one, other = np.asarray(output.last_hidden_state)
    assert relative_difference(packed, np.concatenate([one[:3], other[:4]])) < 1e-5


def test_the_norm_of_relative_positions_learns_as_slowly_as_their_table():
    boxed = boxed_shapes(build_model(tiny_architecture("DebertaV2Model", conv_kernel_size=3)))
    found, head = depths(nn.meta.unbox(boxed), logical_axes(boxed))
    stack = found["stack"]
    assert stack["relative_norm"]["scale"] == stack["relative"]["embedding"] == 0
    first, second = (stack["encoder"][part]["block_0"] for part in ("first", "layers"))
    assert first["convolution"]["taps"]["kernel"] == first["convolution_norm"]["bias"] == [1]
    assert (second["attention_norm"]["scale"], head) == ([2], 3)


def test_the_head_of_published_files_is_read():
    case = CASES["deberta_masked"]
    config, _, params, table = load_case(case)
    tensors = export_weights(table, params, config.vocab_size)
    published = {
        name.replace("cls.predictions.transform", "lm_predictions.lm_head").replace(
            "cls.predictions", "lm_predictions.lm_head"
        ): value
        for name, value in tensors.items()
    }
    assert published.keys() != tensors.keys()
    published["mask_predictions.dense.weight"] = np.ones((2, 2))
    jax.tree.map(np.testing.assert_array_equal, import_case(case, published), params)


def test_more_buckets_than_distances_are_refused():
    with pytest.raises(ValueError, match="position_buckets 256"):
        DebertaV2Config(max_positions=128)
