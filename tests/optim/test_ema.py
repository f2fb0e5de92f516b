"""The running average of the weights: its numbers, what uses it, what it costs when off."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.objectives.base import LossTerms, ModelFunctions
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.training.state import TrainState
from flax_transformers.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Line:
    """The gradient of ``w`` is the batch's mean."""

    def terms(self, model, params, batch, rngs):
        total = jnp.sum(batch["x"] * params["w"])
        return LossTerms({"line": (total, jnp.sum(batch["weight"]), 1.0)}, {})


FUNCTIONS = ModelFunctions(None, None, None)


def states(config, slopes):
    """After each step of gradient descent with the gradients ``slopes``."""
    zero = jnp.zeros((), jnp.int32)
    params = {"w": jnp.array(2.0)}
    ema = {"w": jnp.array(2.0)} if config.is_on else None
    optimizer = optax.sgd(1.0)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(zero, params, optimizer.init(params), key, zero, zero, ema)
    step = jax.jit(make_train_step(Line(), FUNCTIONS, optimizer, 1, ema=config))
    found = []
    for slope in slopes:
        state, _ = step(state, {"x": jnp.full(4, slope), "weight": jnp.ones(4)})
        found.append(jax.device_get(state))
    return found


SLOPES = [1.0, -3.0, np.inf, 2.0, 0.5]


def by_hand(decay, warmup):
    w = average = 2.0
    t, found = 0, []
    for slope in SLOPES:
        if np.isfinite(slope):
            w -= slope
            keep = min(decay, (1 + t) / (10 + t)) if warmup else decay
            average = keep * average + (1 - keep) * w
            t += 1
        found.append(average)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "warmup"), [(0.9, True), (0.15, True), (0.9, False)])
def test_the_average_is_that_of_the_updates_made(decay, warmup):
    """A step that is skipped changes nothing, and does not count in the warm-up."""
    found = states(EMAConfig(decay, warmup), SLOPES)
    np.testing.assert_allclose([s.ema["w"] for s in found], by_hand(decay, warmup), rtol=1e-6)
    assert found[2].ema == found[1].ema


@pytest.mark.slow
def test_training_itself_does_not_see_the_average():
    on, off = states(EMAConfig(0.9), SLOPES), states(EMAConfig(), SLOPES)
    assert [s.params["w"] for s in on] == [s.params["w"] for s in off]


def test_off_it_has_no_copy_and_the_parameters_themselves_are_evaluated():
    state = states(EMAConfig(), SLOPES)[-1]
    assert state.ema is None
    assert state.evaluation_params is state.params
    averaged = states(EMAConfig(0.9), SLOPES)[-1]
    assert averaged.evaluation_params is averaged.ema


def test_a_state_that_starts_from_other_parameters_averages_from_them():
    fresh = states(EMAConfig(0.9), SLOPES)[-1].with_variables({"w": jnp.array(7.0)})
    assert (fresh.params["w"], fresh.ema["w"]) == (7.0, 7.0)
    assert fresh.ema["w"] is not fresh.params["w"]  # both are donated to the first step


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match=f"ema.decay is {decay}"):
        EMAConfig(decay)
