"""BASIC: its sizes, its embeddings, and the statistics of its image encoder in training."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_transformers.families import coatnet
from flax_transformers.families._maps import BatchNormConfig
from flax_transformers.families.basic import SIZES, BasicConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.optim.selection import logical_axes
from flax_transformers.testing import relative_difference, tiny_architecture
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_model, drawn_parameters, parameter_shapes

LARGE_TEXT = BasicConfig(hidden_size=2048, num_heads=16, intermediate_size=8192)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        pytest.param(SIZES["basic-s"], 108, id="s"),
        pytest.param(SIZES["basic-m"], 184, id="m", marks=pytest.mark.full),
        pytest.param(LARGE_TEXT, 670, id="l", marks=pytest.mark.full),
    ],
)
def test_text_encoders_have_the_published_number_of_parameters(config, millions):
    leaves = jax.tree.leaves(parameter_shapes(build_model(config))["text_tower"])
    assert round(sum(math.prod(leaf.shape) for leaf in leaves) / 1e6) == millions


def test_image_encoders_are_those_of_the_paper():
    for size, of in (("basic-s", "coatnet-0"), ("basic-m", "coatnet-3")):
        assert replace(SIZES[size].vision, hidden_head=True) == coatnet.SIZES[of]


@pytest.mark.slow
def test_a_text_has_the_same_embedding_however_far_it_is_padded():
    model, params = drawn_model("BasicModel", num_layers=1)
    ids = np.array([[5, 9, 7, 0, 0, 0], [4, 8, 3, 6, 2, 0]], np.int32)

    def embed(ids):
        return model.apply({"params": params}, ids, method="embed_text")

    padded = jax.jit(embed)(ids)
    assert relative_difference(jax.jit(embed)(ids[:1, :3]), padded[:1]) < 1e-6
    np.testing.assert_allclose(jnp.linalg.norm(padded, axis=-1), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.full
def test_a_batch_in_chunks_has_the_gradients_and_the_statistics_of_the_whole():
    vision = replace(
        tiny_architecture("CoAtNetForImageClassification", head_dim=8, stage_depths=(1, 1, 1, 1)),
        batch_norm=BatchNormConfig(rows=2),
        hidden_head=False,
    )
    model = build_model(tiny_architecture("BasicModel", vision=vision, num_layers=1))
    params = drawn_parameters(model, parameter_shapes(model))
    random = np.random.default_rng(0)
    batch = {
        "pixel_values": random.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8),
        "input_ids": random.integers(1, 90, (4, 6)).astype(np.int32),
        "weights": np.ones(4, np.float32),
    }
    objective, functions = ImageTextContrastive(image_size=32), model_functions(model)

    def loss(params, chunks):
        rngs = {"dropout": jax.random.key(0)}
        terms = objective.whole_batch_terms(functions, params, batch, rngs, chunks)
        total, count, _ = terms.losses["contrastive"]
        return total / count

    whole, parts = (jax.jit(jax.grad(loss), static_argnums=1)(params, n) for n in (1, 2))
    axes, parts = logical_axes(boxed_shapes(model)), flatten_dict(parts)
    assert any("running" in named for named in axes.values())
    for name, value in flatten_dict(whole).items():
        # A step divides movements, which add up over chunks, by their number.
        expected = value * (2 if "running" in axes[name] else 1)
        np.testing.assert_allclose(parts[name], expected, atol=1e-5 * abs(expected).max() + 1e-8)
