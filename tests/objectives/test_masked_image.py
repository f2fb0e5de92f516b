"""Which patches are hidden, and that only these count."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_transformers.families.mae import MaeConfig, hide_patches
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.masked_image import MaskedImage, mask_noise
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

OBJECTIVE = MaskedImage(mean=(0.5,), std=(0.25,))
MODEL = MaeConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    decoder_hidden_size=8,
    decoder_layers=1,
    decoder_heads=2,
    decoder_intermediate_size=8,
    dropout=0.0,
    attention_dropout=0.0,
)


@pytest.fixture(scope="module")
def model():
    """Parameters; and of them and a batch of four: (loss term, reconstruction), gradient."""
    module = build_model(MODEL, ComputeConfig())
    functions = model_functions(module)
    params = drawn_parameters(module, parameter_shapes(module))

    def loss(params, rows):
        reconstruction = OBJECTIVE.reconstruct(functions, params, rows, {})
        found = OBJECTIVE.terms(functions, params, rows, {})
        term = found.losses["reconstruction"]
        patches = reconstruction.predicted_BTK, reconstruction.masked_BT
        return term[0], (term, found.metrics, *patches)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda rows: (*compiled(params, rows)[0][1], compiled(params, rows)[1])


def row(number):
    rng = np.random.default_rng(number)
    example = {"image": rng.integers(0, 256, (8, 8, 1), np.uint8), "label": np.int32(0)}
    return OBJECTIVE.prepare(example, rng, Vocabulary(size=1, pad_id=0), 8)


def batch(numbers):
    rows = [row(number) for number in numbers]
    return {name: np.stack([one[name] for one in rows]) for name in rows[0]}


def test_the_mask_of_an_example_depends_only_on_its_key():
    keys = batch(range(6))["mask_key"]
    noise = np.asarray(mask_noise(keys, 16))
    assert noise.shape == (6, 16) and (noise >= 0).all() and (noise < 1).all()
    assert (noise == np.concatenate([mask_noise(keys[:2], 16), mask_noise(keys[2:], 16)])).all()
    assert len({one.tobytes() for one in noise}) == 6


def test_every_patch_is_hidden_equally_often():
    keys = np.random.default_rng(0).integers(0, 1 << 32, (4000, 2), np.uint32)
    _, hidden, _ = hide_patches(mask_noise(keys, 16), 0.75)
    assert (np.asarray(hidden).sum(1) == 12).all()
    often = np.asarray(hidden).sum(0)
    assert (((often - 3000) ** 2 / (4000 * 0.75 * 0.25)).sum()) < 45  # chi-square, 15 degrees


@pytest.mark.slow
def test_the_loss_is_the_mean_squared_error_of_hidden_patches(model):
    rows = batch(range(4))
    (loss, count, coefficient), metrics, predicted, hidden, _ = model(rows)
    assert (count, coefficient) == (4 * 12, 1.0)
    target = (rows["pixel_values"] / 255 - 0.5) / 0.25
    patches = target.reshape(4, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(4, 16, 4)
    errors = ((np.asarray(predicted) - patches) ** 2).mean(-1)
    assert loss == pytest.approx(errors[np.asarray(hidden) == 1].sum(), rel=1e-5)
    assert metrics["loss"] == (loss, count)


@pytest.mark.slow
def test_halves_of_a_batch_add_up_and_examples_of_zeros_have_no_weight(model):
    rows = batch(range(4))
    parts = []
    for half in (slice(0, 1), slice(1, 4)):
        filled = {name: np.zeros_like(values) for name, values in rows.items()}
        for name, values in rows.items():
            filled[name][half] = values[half]
        parts.append(model(filled))
    sums = np.add(parts[0][0][:2], parts[1][0][:2])
    assert np.allclose(model(rows)[0][:2], sums, rtol=1e-6)


@pytest.mark.slow
def test_the_gradient_reaches_encoder_and_decoder(model):
    gradients = model(batch(range(4)))[-1]
    for part in ("embeddings", "stack", "reconstruction_head"):
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[part])) > 0
