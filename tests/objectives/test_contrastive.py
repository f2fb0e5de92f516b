"""Contrastive losses against their definitions; gradient caching; meshes; rows of pairs."""

from __future__ import annotations

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.objectives.base import Frame, ModelFunctions, Vocabulary
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.objectives.contrastive_loss import (
    clipped_scale,
    sigmoid_loss,
    softmax_loss,
)
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from flax_transformers.testing import assert_parity
from flax_transformers.training.step import model_functions, total_loss
from tests.huggingface.tensors import drawn_model

ROWS, WIDTH, LENGTH = 16, 6, 8
LOSSES = {"softmax": "CLIPModel", "sigmoid": "SiglipModel"}
MESHES = (MeshConfig(data=8), MeshConfig(2, 2, 2), MeshConfig(data=1, fsdp=2, expert=4))


def unit(seed):
    vectors = np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


OPERANDS = {
    "image": unit(0),
    "text": unit(1),
    "weight": np.array([1.0] * 13 + [0.0] * 3, np.float32),  # the last three are padding
    "scale": np.float32(7.0),
    "bias": np.float32(-3.0),
}


def divided(loss, image, text, weight, scale, bias):
    """The loss of the package."""
    if loss == "softmax":
        return softmax_loss(image, text, weight, scale)
    return sigmoid_loss(image, text, weight, scale, bias)


def defined(loss, image, text, weight, scale, bias):
    """The loss as the papers write it, with the whole matrix of logits, over the real pairs."""
    image, text = image[:13], text[:13]
    logits = scale * jnp.einsum("IE,JE->IJ", image, text, precision="highest")
    correct = jnp.sum(jnp.argmax(logits, axis=1) == jnp.arange(13))
    if loss == "softmax":
        own = jnp.diagonal(logits)
        ways = [jnp.sum(jax.nn.logsumexp(logits, axis=axis) - own) for axis in (0, 1)]
        return sum(ways) / 2, correct
    sign = 2 * jnp.eye(13) - 1
    return -jnp.sum(jax.nn.log_sigmoid(sign * (logits + bias))), correct


def with_gradients(function, loss):
    """Sums and gradients in the five operands."""

    def both(operands):
        return function(loss, **operands)

    return jax.jit(jax.value_and_grad(both, has_aux=True))(OPERANDS)


@cache
def by_definition(loss):
    return with_gradients(defined, loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_the_definition(loss):
    (found, correct), gradients = with_gradients(divided, loss)
    (expected, expected_correct), expected_gradients = by_definition(loss)
    assert_parity(found, expected, tolerance=1e-6)
    assert correct == expected_correct
    for name in ("image", "text", "scale") + ("bias",) * (loss == "sigmoid"):
        assert_parity(gradients[name], expected_gradients[name], tolerance=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mesh", MESHES, ids=["data", "mixed", "experts"])
def test_losses_and_gradients_are_equal_on_any_mesh(loss, mesh):
    with jax.set_mesh(make_mesh(mesh)), nn.logical_axis_rules(RULES):
        (found, correct), gradients = with_gradients(divided, loss)
    (expected, expected_correct), expected_gradients = by_definition(loss)
    assert_parity(found, expected, tolerance=1e-6)
    assert correct == expected_correct
    for name in ("image", "text", "scale"):
        assert_parity(gradients[name], expected_gradients[name], tolerance=2e-6)


def test_no_device_has_the_whole_matrix_of_the_sigmoid_loss():
    with jax.set_mesh(make_mesh(MeshConfig(data=8))), nn.logical_axis_rules(RULES):
        step = jax.jit(jax.grad(lambda o: divided("sigmoid", **o)[0]))
        text = step.lower(OPERANDS).compile().as_text()
    assert f"f32[{ROWS // 8},{ROWS // 8}]" in text
    assert f",{ROWS}]" not in text
    assert "collective-permute" in text


def test_orthogonal_embeddings_have_the_closed_form_of_the_sigmoid_loss():
    """At the initial scale and bias a pair of equal embeddings has the logit 0, others -10."""
    equal = np.eye(ROWS, dtype=np.float32)
    loss, correct = sigmoid_loss(equal, equal, np.ones(ROWS, np.float32), 10.0, -10.0)
    expected = np.log(2) + (ROWS - 1) * np.log1p(np.exp(-10.0))
    np.testing.assert_allclose(loss / ROWS, expected, rtol=1e-5)
    assert correct == ROWS


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_embeddings_are_not_correct(loss):
    one = jnp.ones((ROWS, 4))
    weights = jnp.ones(ROWS)
    _, correct = divided(loss, image=one, text=one, weight=weights, scale=10.0, bias=-10.0)
    assert correct == 0


def test_the_scale_is_clipped_and_returns():
    below, above = jnp.log(20.0), jnp.log(150.0)
    assert clipped_scale(below) == pytest.approx(20.0)
    assert clipped_scale(above) == pytest.approx(100.0)
    gradient = jax.grad(lambda s, sign: sign * clipped_scale(s))
    assert gradient(below, -1.0) == pytest.approx(-20.0)
    assert gradient(above, -1.0) == 0.0  # would raise it
    assert gradient(above, 1.0) == pytest.approx(100.0)  # lowers it


@cache
def start(loss):
    return drawn_model(LOSSES[loss])


@cache
def batch():
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.integers(0, 256, (ROWS, 3, 32, 32)).astype(np.uint8),
        "input_ids": rng.integers(3, 90, (ROWS, LENGTH)).astype(np.int32),
        "weights": np.ones(ROWS, np.float32),
    }


def loss_of(loss, chunks):
    """The loss of a model, a function of its parameters."""
    objective, functions = ImageTextContrastive(loss=loss), model_functions(start(loss)[0])

    def whole(params):
        return total_loss(objective.whole_batch_terms(functions, params, batch(), {}, chunks))

    return whole


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_chunks_are_those_of_the_whole_batch(loss):
    """In float64, which leaves no doubt, with two layers in place of a model."""
    rng, rows = np.random.default_rng(0), batch()
    inputs = {name: rng.standard_normal((ROWS, 5)) for name in ("pixel_values", "input_ids")}
    params = {name: rng.standard_normal((5, 4)) for name in ("embed_image", "embed_text")}
    params["scale_and_bias"] = np.array([1.0, -2.0])

    def head(name, params, rngs, *arrays, **options):
        if name == "scale_and_bias":
            return tuple(params[name])
        vectors = jnp.tanh(arrays[0]) @ params[name]
        return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)

    class Plain(ImageTextContrastive):
        def normalized(self, pixels_BCHW):
            return pixels_BCHW

    functions = ModelFunctions(hidden_states=None, unembedding=None, head=head)

    def whole(params, chunks):
        rows_of = {**inputs, "weights": rows["weights"].astype(np.float64)}
        found = Plain(loss=loss).whole_batch_terms(functions, params, rows_of, {}, chunks)
        return total_loss(found)

    with jax.enable_x64(True):
        (one, expected), (loss_of_four, found) = (
            jax.jit(jax.value_and_grad(whole), static_argnums=1)(params, chunks)
            for chunks in (1, 4)
        )
    np.testing.assert_allclose(loss_of_four, one, rtol=1e-12)
    for name, gradient in expected.items():
        assert gradient.dtype == np.float64
        assert_parity(found[name], gradient, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.full
def test_chunks_of_a_model_have_the_gradient_of_the_whole_batch():
    params = start("sigmoid")[1]
    (value, found), (expected_value, expected) = (
        jax.jit(jax.value_and_grad(loss_of("sigmoid", chunks)))(params) for chunks in (4, 1)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    difference = jax.tree.map(jnp.subtract, found, expected)
    assert optax.tree.norm(difference) < 1e-6 * optax.tree.norm(expected)


@pytest.mark.slow
def test_the_first_softmax_loss_is_that_of_a_guess():
    loss = jax.jit(loss_of("softmax", 1))(start("softmax")[1])
    assert abs(loss - np.log(ROWS)) < 0.1


VOCABULARY = Vocabulary(size=20, pad_id=0, bos_id=1, eos_id=2, special_ids=(0, 1, 2))


def example(tokens):
    return {"image": np.zeros((4, 4, 3), np.uint8), "tokens": np.array(tokens, np.int32)}


def test_captions_get_their_special_tokens_and_are_cut_before_the_end():
    objective, rng = ImageTextContrastive(image_size=4), np.random.default_rng(0)
    row = objective.prepare(example([7, 8]), rng, VOCABULARY, 6)
    assert row["input_ids"].tolist() == [1, 7, 8, 2, 0, 0]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert row["pixel_values"].shape == (3, 4, 4)
    assert row["weights"] == 1.0
    row = objective.prepare(example(range(3, 12)), rng, VOCABULARY, 6)
    assert row["input_ids"].tolist() == [1, 3, 4, 5, 6, 2]
    own = Vocabulary(size=20, pad_id=1, eos_id=1, special_ids=(1,), frame=Frame((), (1,)))
    row = objective.prepare(example([7, 8]), rng, own, 5)
    assert row["input_ids"].tolist() == [7, 8, 1, 1, 1]
