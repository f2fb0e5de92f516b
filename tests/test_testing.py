"""The comparisons and the corpus that tests rely on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import all_families, config_json
from flax_transformers.testing import (
    assert_bit_equal,
    assert_parity,
    relative_difference,
    tiny_architecture,
    tiny_model,
    write_corpus,
)

TREE = {"a": {"b": np.array([1.0, 0.0], np.float32)}, "c": np.array([np.nan], np.float32)}


def test_equal_trees_are_bit_equal():
    assert_bit_equal({"c": TREE["c"].copy(), "a": {"b": TREE["a"]["b"].copy()}}, TREE)


@pytest.mark.parametrize(
    "other",
    [
        np.array([np.nextafter(np.float32(1), np.float32(2)), 0], np.float32),
        np.array([1.0, -0.0], np.float32),
        np.array([1.0, 0.0], np.float32).view(np.int32),
        np.array([[1.0, 0.0]], np.float32),
    ],
    ids=["last bit", "sign of zero", "dtype", "shape"],
)
def test_what_differs_in_any_bit_is_named(other):
    with pytest.raises(AssertionError, match=r"not bit-equal: \['a'\]\['b'\]$"):
        assert_bit_equal({"a": {"b": other}, "c": TREE["c"]}, TREE)


def test_trees_of_other_names_are_not_bit_equal():
    with pytest.raises(AssertionError):
        assert_bit_equal({"a": TREE["a"], "d": TREE["c"]}, TREE)


def test_a_difference_is_relative_to_the_largest_value():
    assert relative_difference([1.0, -7.5], [1.0, -8.0]) == 0.0625
    assert not relative_difference([np.nan], [1.0]) < 1.0


def test_a_corpus_is_documents_with_empty_lines_between_and_repeats_exactly(tmp_path):
    for name in ("one", "again"):
        write_corpus(tmp_path / name, documents=7)
    write_corpus(tmp_path / "other", documents=7, seed=1)
    one, again, other = ((tmp_path / n).read_text() for n in ("one", "again", "other"))
    assert one == again != other
    assert len(one.split("\n\n")) == 7


def test_parity_is_asked_for_at_the_places_that_count_and_measured_by_the_largest_value():
    expected = np.array([[1.0, 200.0], [3.0, 4.0]])
    found = expected + np.array([[1e-3, 0.0], [9.0, 0.0]])
    assert_parity(found, expected, where=[[1, 1], [0, 1]])
    with pytest.raises(AssertionError, match="differs by 4.5e-02"):
        assert_parity(found, expected)
    with pytest.raises(AssertionError, match="differs by 5.0e-06"):
        assert_parity(found, expected, where=[[1, 1], [0, 1]], tolerance=1e-6)
    with pytest.raises(AssertionError, match="shape"):
        assert_parity(found[0], expected)


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.config.__name__)
def test_every_architecture_has_a_tiny_model_that_can_be_written(family):
    for architecture in family.architectures:
        config = tiny_architecture(architecture)
        assert config.architecture == architecture
        if architecture in family.only_here:
            with pytest.raises(UserError, match=f"transformers has no class {architecture}"):
                config_json(config)
            continue
        assert family.from_huggingface(config_json(config)) == config
        if config.architecture.endswith("Classification"):
            named = dataclasses.replace(config, num_labels=3, label_names=("x", "y", "z"))
            assert family.from_huggingface(config_json(named)) == named


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(family.config().architecture, marks=pytest.mark.full)
        for family in all_families()
    ]
    + [pytest.param("MBartModel", marks=pytest.mark.full), "UMT5ForSequenceClassification"],
)
def test_a_tiny_model_of_any_family_is_finite(architecture):
    model, params = tiny_model(architecture, num_layers=1)
    inputs = model.example_inputs()
    if "attention_mask" in model.inputs:  # the last row fills up a batch
        inputs["attention_mask"] = jnp.ones_like(inputs["input_ids"]).at[-1].set(0)
    output = jax.jit(model.apply)({"params": params}, **inputs)
    floats = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and all(np.isfinite(leaf).all() for leaf in floats)
    assert model.config.num_layers == 1


def test_a_tiny_model_has_its_special_tokens_in_its_vocabulary():
    config = tiny_architecture("MarianMTModel")
    assert (config.pad_id, config.decoder_start_id, config.eos_ids) == (95, 95, (0,))
    assert tiny_architecture("GPT2LMHeadModel").eos_ids == (95,)
