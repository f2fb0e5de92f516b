"""Pictures that a masked autoencoder reconstructs, and its baseline."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from matplotlib.image import imread

from flax_transformers.data.dataset import prepare
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.evaluation.pictures import picture_grid, write_png
from flax_transformers.evaluation.reconstructions import (
    constant_guess,
    reconstruction_evaluator,
    three_rows,
)
from flax_transformers.evaluation.tasks import baselines
from flax_transformers.families.mae import MaeConfig, patch_targets
from flax_transformers.families.vit import ViTConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import replicated
from flax_transformers.testing import tiny_config
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import Evaluation, ImagePhase
from flax_transformers.training.step import model_functions
from tests.data.images.test_dataset import write_idx
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

OBJECTIVE = MaskedImage(mean=(0.25,), std=(0.5,))
MODEL = MaeConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=8,
    decoder_hidden_size=4,
    decoder_layers=1,
    decoder_heads=1,
    decoder_intermediate_size=4,
)


def masked_config(path, **changes):
    data = ImageData(source=ImageSource(str(path)), channels=1, crop_fraction=1.0)
    phases = (ImagePhase(steps=1, image_size=8, batch_size=8),)
    fields = {
        "model": MODEL,
        "objective": OBJECTIVE,
        "data": data,
        "phases": phases,
        "evaluation": Evaluation(batch_size=8),
    }
    return dataclasses.replace(tiny_config("text.txt", "store"), **(fields | changes))


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_idx(tmp_path / "mnist", count=(48, 10))


@pytest.mark.parametrize("normalised", [False, True])
def test_pictures_show_the_image_its_visible_part_and_the_reconstruction(normalised):
    model = dataclasses.replace(MODEL, norm_pix_loss=normalised)
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)) / 255
    values = ((images - 0.25) / 0.5).astype(np.float32)
    perfect = np.asarray(patch_targets(model, jnp.asarray(values)))
    hidden = np.zeros((3, 16), np.float32)
    hidden[:, 5] = 1  # row 1, column 1 of the patches
    rows = three_rows(OBJECTIVE, model, values, perfect, hidden)
    assert rows.shape == (3, 3, 8, 8, 1)
    expected = images.transpose(0, 2, 3, 1)
    assert np.allclose(rows[0], expected, atol=1e-6)
    assert np.allclose(rows[2], expected, atol=1e-5)
    assert (rows[1][:, 2:4, 2:4] == 0.5).all()
    visible = np.ones((8, 8), bool)
    visible[2:4, 2:4] = False
    assert np.allclose(rows[1][:, visible], expected[:, visible], atol=1e-6)


@pytest.mark.slow
def test_held_out_images_are_reconstructed_during_training(mnist, tmp_path, monkeypatch):
    config = masked_config(mnist)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = build_model(MODEL, ComputeConfig())
    params = jax.device_put(drawn_parameters(model, parameter_shapes(model)), replicated(mesh))
    snapshot = Snapshot(7, params, config.phases[0], mesh, model_functions(model), None)
    prepared = prepare(config.data)
    traced, reconstruct = [], MaskedImage.reconstruct
    monkeypatch.setattr(
        MaskedImage, "reconstruct", lambda *args: traced.append(1) or reconstruct(*args)
    )
    evaluate = reconstruction_evaluator(config, prepared, epath.Path(tmp_path))
    with jax.set_mesh(mesh):
        assert evaluate(snapshot) == {}
        evaluate(dataclasses.replace(snapshot, step=8))
    assert len(traced) == 1  # one program for all evaluations
    assert (tmp_path / "samples" / "step_00000008.png").exists()
    picture = imread(tmp_path / "samples" / "step_00000007.png")[:, :, 0]
    assert picture.shape == (3 * 82 + 2, 8 * 82 + 2)
    first = prepared.validation.pixels(0, 1)[:, :, 0] / 255
    assert np.allclose(picture[2:82:10, 2:82:10], first, atol=1 / 255)
    assert np.isclose(picture[84:164:10, 2:82:10], 128 / 255).sum() >= 12 * 4  # hidden is grey


def test_the_baseline_is_the_mean_patch_and_a_mean_image_is_scored_alike(mnist):
    config = masked_config(mnist)
    prepared = prepare(config.data)
    (patch,) = baselines(config, prepared)
    image = constant_guess(config, prepared, "mean image", lambda mean_TK: mean_TK)

    def patches(split):
        pixels = np.stack([split.pixels(i, 1)[:, :, 0] for i in range(len(split))])
        cut = pixels.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        return (cut / 255 - 0.25) / 0.5

    train, held_out = patches(prepared.train), patches(prepared.validation)
    # Noise has no structure: on 10 images of 12 hidden patches each the guesses are about as good
    # on hidden patches as on all of them.
    everywhere = ((held_out - train.mean((0, 1))) ** 2).mean()
    assert patch.score == pytest.approx(everywhere, rel=0.1)
    assert image.score == pytest.approx(((held_out - train.mean(0)) ** 2).mean(), rel=0.1)
    assert patch.metric == "eval/loss" and patch.counted == "120 hidden patches"


def test_the_baseline_of_a_classifier_is_the_majority_class(mnist):
    config = masked_config(
        mnist,
        objective=ImageClassification(mean=(0.0,), std=(1.0,)),
        model=ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3),
    )
    prepared = prepare(config.data)
    (found,) = baselines(config, prepared)
    assert (found.metric, found.score) == ("eval/accuracy", 0.4)  # labels are 0, 1, 2, 0 ...


def test_small_pictures_are_enlarged_and_stand_apart(tmp_path):
    pictures = np.zeros((2, 3, 28, 28, 1))
    pictures[1, 2] = 0.5
    grid = picture_grid(pictures)
    assert grid.shape == (2 * 86 + 2, 3 * 86 + 2, 3)
    assert (grid[:2] == 255).all() and (grid[2:86, 2:86] == 0).all()
    assert (grid[88:172, 174:258] == 128).all()
    path = epath.Path(tmp_path) / "deep" / "grid.png"
    write_png(path, grid)
    read = PIL.Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    assert (np.asarray(read) == grid).all()
