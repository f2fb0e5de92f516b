"""Running statistics in training: moved, skipped with a step, saved, restored and evaluated."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import Checkpoints, restore_params
from flax_transformers.families._maps import BatchNormConfig
from flax_transformers.families.coatnet import CoAtNetConfig
from flax_transformers.families.vit import ViTConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.testing import assert_bit_equal

ROWS, SIDE = 16, 16
MODEL = ViTConfig(
    image_size=SIDE, num_channels=1, patch_size=4, stem=((4, 2), (6, 2)), hidden_size=8,
    num_layers=1, num_heads=2, intermediate_size=16, num_labels=3, init_std=0.1,
    batch_norm=BatchNormConfig(rows=4),
)  # fmt: skip
COATNET = CoAtNetConfig(
    image_size=SIDE, num_channels=1, stem_widths=(4, 4), stage_widths=(4, 8, 8, 16), head_dim=4,
    stage_depths=(1, 2, 1, 1), strides=(2, 2, 1, 2, 1), num_labels=3, init_std=0.1,
    batch_norm=BatchNormConfig(rows=4),
)  # fmt: skip


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.integers(0, 256, (ROWS, 1, SIDE, SIDE)).astype(np.uint8),
        "labels": rng.integers(0, 3, (ROWS, 1)).astype(np.int32),
        "label_weights": np.ones((ROWS, 1), np.float32),
    }


def trainer(model=MODEL, devices=1, optimizer=None, **settings):
    return ft.Trainer(
        model=model,
        objective=ImageClassification(mean=(0.5,), std=(0.5,)),
        optimizer=optimizer or AdamW(learning_rate=1e-2, schedule=Schedule("constant")),
        mesh=ft.make_mesh(devices=jax.devices()[:devices]),
        total_steps=10,
        ema=EMAConfig(0.9),
        **settings,
    )


def after(of, steps, state=None, start=0):
    state = of.init(seed=0) if state is None else state
    for step in range(start, start + steps):
        state, _ = of.step(state, batch(step))
    return jax.device_get(state)


def placed(of, state):
    """A state of the host's on the mesh of a trainer."""
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, of.abstract))


def statistics(tree):
    """By name, of a model state or of a tree that has it."""
    leaves = flatten_dict(tree, sep="/")
    return {name: leaf for name, leaf in leaves.items() if name.endswith(("/mean", "/variance"))}


@pytest.fixture(scope="module")
def alone():
    return trainer()


@pytest.fixture(scope="module")
def two_steps(alone):
    return after(alone, 2)


@pytest.mark.slow
@pytest.mark.full  # tests/multi_device/test_running_statistics.py has an example
@pytest.mark.parametrize(
    ("devices", "micro_batches"), [(2, 2), (2, 1), (8, 1), (1, 2), (1, 4)]
)  # fmt: skip
def test_those_of_coatnet_are_equal_for_any_devices_and_micro_batches(devices, micro_batches):
    # Features have a standard deviation around one; many means are zero but for rounding.
    found = after(trainer(COATNET, devices, micro_batches=micro_batches), 2).model_state
    for name, expected in statistics(coatnet_alone()).items():
        value = statistics(found)[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@cache
def coatnet_alone():
    return after(trainer(COATNET), 2).model_state


@pytest.mark.slow
def test_every_statistic_moves_and_no_optimizer_sees_it(alone, two_steps):
    fresh = statistics(jax.device_get(alone.init(seed=0)).model_state)
    moved = statistics(two_steps.model_state)
    assert len(moved) == 2 * len(MODEL.stem)
    for name, value in moved.items():
        assert not np.allclose(value, fresh[name]), name
    assert not statistics(two_steps.params)
    moments = [leaf for leaf in jax.tree.leaves(two_steps.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(flatten_dict(two_steps.params))
    averages = statistics(two_steps.ema)
    assert averages.keys() == moved.keys()
    assert all((moved[name] != average).any() for name, average in averages.items())


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_went_on_to_the_last_bit(alone, tmp_path):
    of = alone
    straight = of.init(seed=0)
    for step in range(2):
        straight, _ = of.step(straight, batch(step))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, straight, {})
    checkpoints.wait()
    resumed = checkpoints.restore_newest(of.abstract).state
    checkpoints.close()
    assert_bit_equal(resumed.model_state, straight.model_state)
    assert_bit_equal(after(of, 2, resumed, start=2), after(of, 2, straight, start=2))


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [True, False])
def test_a_model_is_restored_with_its_statistics(alone, two_steps, tmp_path, averaged):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, placed(alone, two_steps), {})
    checkpoints.wait()
    checkpoints.close()
    expected = two_steps.ema if averaged else two_steps.variables
    assert_bit_equal(restore_params(tmp_path, averaged=averaged), expected)
    on_mesh = restore_params(tmp_path, alone.abstract_params, averaged=averaged)
    assert_bit_equal(jax.device_get(on_mesh), expected)


@pytest.mark.slow
def test_a_run_starts_from_given_statistics(alone, two_steps):
    state = jax.device_get(alone.init(seed=1, params=two_steps.variables))
    assert_bit_equal((state.params, state.model_state), (two_steps.params, two_steps.model_state))
    assert_bit_equal(state.ema, two_steps.variables)


@pytest.mark.slow
def test_a_skipped_step_moves_nothing(alone, two_steps):
    state = placed(alone, two_steps)
    bad = batch(1) | {"label_weights": np.full((ROWS, 1), np.nan, np.float32)}
    skipped, _ = alone.step(state, bad)
    assert int(skipped.skipped) == 1
    for name in ("params", "model_state", "ema"):
        assert_bit_equal(jax.device_get(getattr(skipped, name)), getattr(two_steps, name))


@pytest.mark.slow
@pytest.mark.full
def test_an_optimizer_of_optax_moves_them_alike(alone):
    expected = statistics(after(alone, 1).model_state)  # the first batch meets equal parameters
    found = statistics(after(trainer(optimizer=optax.sgd(0.1)), 1).model_state)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_evaluation_uses_the_running_statistics(alone, two_steps):
    def loss(factor):
        average = flatten_dict(two_steps.ema)
        changed = {n: a * factor if n[-1] == "variance" else a for n, a in average.items()}
        state = placed(alone, two_steps.replace(ema=unflatten_dict(changed)))
        return alone.evaluate(state, [batch(5)])["eval/loss"]

    assert abs(loss(1) - loss(2)) > 1e-4
