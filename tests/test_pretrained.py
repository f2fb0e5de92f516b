"""What is done with weights besides reading them: images of another size, classes in an order."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.models.vision import change_image_size
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.pretrained import initial_parameters
from flax_transformers.testing import assert_bit_equal, tiny_model


@pytest.mark.slow
def test_a_model_for_small_images_is_loaded_for_large_ones(tmp_path):
    model, params = tiny_model("ViTForImageClassification", image_size=32)
    ft.save_pretrained(tmp_path / "vit", model, params)
    larger, resized = ft.load_pretrained(tmp_path / "vit", image_size=(48, 64))
    images = np.zeros((1, 3, 48, 64), np.float32)
    assert jax.jit(larger.apply)({"params": resized}, images).logits.shape == (1, 2)
    expected = change_image_size(model.config, params, (48, 64))[1]
    assert_bit_equal(resized, expected)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, resized)]
    assert sizes[1] - sizes[0] == 32 * (6 * 8 - 4 * 4)


@pytest.mark.slow
def test_a_text_model_has_no_image_size(tmp_path):
    ft.save_pretrained(tmp_path / "gpt2", *tiny_model("GPT2LMHeadModel"))
    with pytest.raises(UserError, match="GPT2LMHeadModel, which sees no images"):
        ft.load_pretrained(tmp_path / "gpt2", image_size=32)


@pytest.mark.slow
def test_a_head_is_not_taken_over_for_its_classes_in_another_order(tmp_path):
    model, params = tiny_model(
        "BertForSequenceClassification", num_labels=3, label_names=("no", "maybe", "yes")
    )
    ft.save_pretrained(tmp_path / "bert", model, params)
    other = dataclasses.replace(model.config, label_names=("maybe", "no", "yes"))
    with pytest.raises(UserError, match="in the order no, maybe, yes, the data in the order maybe"):
        initial_parameters(tmp_path / "bert", other, make_mesh(MeshConfig()), seed=0)
