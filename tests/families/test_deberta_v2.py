"""DeBERTa-v2 and v3 against Hugging Face's, through tests/golden/deberta_v2.npz; its positions."""

from __future__ import annotations

from dataclasses import replace

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
from flax_transformers.huggingface.family import config_json
from flax_transformers.testing import relative_difference
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


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(replace(SIZES[name], architecture="DebertaV2Model")) == PUBLISHED[name]


def test_a_published_config_is_read():
    """The config.json of microsoft/deberta-v3-base."""
    published = {
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
    assert from_huggingface(published) == SIZES["deberta-v3-base"]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("model_type", "deberta", "model_type 'deberta'"),
        ("conv_kernel_size", 3, "conv_kernel_size 3"),
        ("share_att_key", False, "share_att_key False"),
        ("pos_att_type", ["p2p"], r"pos_att_type \['p2p'\]"),
        ("position_buckets", "256", "position_buckets '256'"),
        ("embedding_size", 128, "embedding_size 128"),
        ("max_relative_positions", 100, "longest distance of 100"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        from_huggingface({field: value})


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
    model, params = drawn_model("DebertaV2Model", position_buckets=8, max_relative_positions=20)
    ids = np.array([[5, 9, 7, 3, 11, 2, 8], [5, 9, 7, 0, 0, 0, 0], [3, 11, 2, 8, 0, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
    output = jax.jit(model.apply)({"params": params}, ids, segment_ids=segments)
    packed, one, other = np.asarray(output.last_hidden_state)
    assert relative_difference(packed, np.concatenate([one[:3], other[:4]])) < 1e-5


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
