"""ELECTRA against Hugging Face's, through tests/golden/electra.npz; its generator and its sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.errors import UserError
from flax_transformers.families.electra import JSON, SIZES, ElectraConfig
from flax_transformers.huggingface.family import config_json
from flax_transformers.restore import converted_meta
from flax_transformers.testing import relative_difference
from tests.families.parity import count_parameters, first_by_default
from tests.golden import electra as golden
from tests.huggingface.tensors import drawn_model

CASES = {case.name: case for case in golden.CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_the_way_in_and_out(name):
    config = JSON.read(CASES[name].config)
    assert config.embedding_size == CASES[name].config["embedding_size"]
    assert JSON.read(config_json(config)) == config


def test_fields_that_a_file_leaves_out_have_their_published_defaults():
    assert JSON.read({"model_type": "electra"}) == ElectraConfig()


PUBLISHED = {
    "electra-small-discriminator": 13_549_057,
    "electra-small-generator": 13_546_682,
    "electra-base-discriminator": 109_483_009,
    "electra-base-generator": 33_740_602,
    "electra-large-discriminator": 335_142_913,
    "electra-large-generator": 51_295_290,
}


@pytest.mark.parametrize("name", first_by_default(SIZES))
def test_sizes_have_the_published_number_of_parameters(name):
    assert count_parameters(SIZES[name]) == PUBLISHED[name]


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_generator_of_a_discriminator_is_the_published_one(size):
    discriminator = SIZES[f"electra-{size}-discriminator"]
    assert discriminator.generator == SIZES[f"electra-{size}-generator"]


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("model_type", "bert", "model_type 'bert'"),
        ("hidden_act", "tanh", "activation 'tanh'"),
        ("embedding_size", 0, "embedding_size"),
        ("position_embedding_type", "relative_key", "position_embedding_type"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_field(field, value, names):
    with pytest.raises(UserError, match=names):
        JSON.read({field: value})


def test_a_generator_with_a_part_of_a_head_is_refused():
    with pytest.raises(ValueError, match=r"model\.num_heads 4 .*generator_divisor 3"):
        ElectraConfig(architecture="ElectraWithGenerator", hidden_size=264, generator_divisor=3)


IDS = np.array([[5, 9, 7, 3, 11, 2], [4, 8, 8, 6, 0, 0]], np.int32)
MASK = (IDS > 0).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("embedding_size", first_by_default([24, 8, 32]))
def test_both_halves_of_a_pretrained_model_are_written_alone(tmp_path, embedding_size):
    """Embeddings are shared; of widths 8 and 32 no linear layer leads to one of the two."""
    divisor = 2 if embedding_size == 24 else 4
    model, params = drawn_model(
        "ElectraWithGenerator", embedding_size=embedding_size, generator_divisor=divisor
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": params}, converted_meta(model.config), {})
    checkpoints.close()
    packed = {"token_type_ids": IDS % 2, "segment_ids": MASK + (IDS > 8)}
    calls = ({"attention_mask": MASK}, {**packed, "position_ids": MASK * np.arange(6)})
    both = [jax.jit(model.apply)({"params": params}, IDS, **inputs) for inputs in calls]
    for architecture, field in (
        ("ElectraForPreTraining", "logits"),
        ("ElectraForMaskedLM", "generator_logits"),
    ):
        one, own = ft.load_pretrained(tmp_path, architecture=architecture)
        ft.save_pretrained(tmp_path / architecture, one, own)
        one, own = ft.load_pretrained(tmp_path / architecture)
        assert one.config.architecture == architecture
        for inputs, outputs in zip(calls, both, strict=True):
            found = jax.jit(one.apply)({"params": own}, IDS, **inputs).logits
            expected = getattr(outputs, field)
            assert found.shape == expected.shape
            assert relative_difference(found[MASK == 1], expected[MASK == 1]) < 1e-6


@pytest.mark.slow
def test_the_generator_predicts_the_positions_that_are_asked_for():
    model, params = drawn_model("ElectraWithGenerator")
    generate = partial(jax.jit(partial(model.apply, method="generate")), {"params": params})
    positions = np.array([[3, 0], [1, 1]], np.int32)
    whole = generate(IDS, MASK).logits()
    some = generate(IDS, MASK, positions).logits()
    expected = np.take_along_axis(np.asarray(whole), positions[:, :, None], axis=1)
    assert relative_difference(some[..., :96], expected[..., :96]) < 1e-6


def test_both_models_in_one_exist_only_here():
    config = replace(ElectraConfig(), architecture="ElectraWithGenerator")
    with pytest.raises(UserError, match="transformers has no class ElectraWithGenerator"):
        config_json(config)
