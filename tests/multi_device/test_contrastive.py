"""Contrastive training: a step does not depend on the mesh or the number of micro-batches."""

from __future__ import annotations

import math
from functools import cache

import jax
import numpy as np
import optax
import pytest

from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.testing import tiny_model
from flax_transformers.training.trainer import Trainer
from tests.multi_device.states import placed_state

ROWS, LENGTH = 16, 8
ARCHITECTURES = {"softmax": "CLIPModel", "sigmoid": "SiglipModel"}


@cache
def start(loss):
    return tiny_model(ARCHITECTURES[loss])


def after_a_step(loss, mesh, micro_batches):
    """The loss of a step, and the parameters that it reaches."""
    model, params = start(loss)
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.integers(0, 256, (ROWS, 3, 32, 32)).astype(np.uint8),
        "input_ids": rng.integers(3, 90, (ROWS, LENGTH)).astype(np.int32),
        "weights": np.ones(ROWS, np.float32),
    }
    trainer = Trainer(
        model=model,
        objective=ImageTextContrastive(loss=loss),
        optimizer=optax.sgd(0.01),
        mesh=make_mesh(mesh),
        micro_batches=micro_batches,
    )
    state, metrics = trainer.step(placed_state(trainer.abstract, params), batch)
    return metrics["train/loss"], state.params


def norm(tree):
    return math.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", pytest.param("sigmoid", marks=pytest.mark.full)])
def test_a_step_does_not_depend_on_the_mesh_or_on_micro_batches(loss):
    expected_loss, expected = after_a_step(loss, MeshConfig(data=8), 1)
    found_loss, found = after_a_step(loss, MeshConfig(2, 2, 2), 4)
    np.testing.assert_allclose(found_loss, expected_loss, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, expected)
    first = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), expected, start(loss)[1])
    assert norm(moved) < 1e-5 * norm(first)
