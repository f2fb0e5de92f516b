"""Steps whose gradients are far larger than lately are left out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.errors import UserError
from flax_transformers.optim.spike_detection import WINDOW, is_spike, renewed_mean
from flax_transformers.testing import assert_bit_equal
from flax_transformers.training.step import make_train_step
from tests.monitoring.test_throughput import CONFIG, good, new_step_metrics
from tests.training.test_step import BATCH, LINE, TwoTerms, state_of

UPDATES = WINDOW + 20


def batches(spikes=(), size=50.0):
    """Batches whose order matters, some of them with errors ``size`` times as large."""
    for number in range(UPDATES):
        target = BATCH["target"] + number % 7
        yield BATCH | {"target": target * size if number in spikes else target}


def train(given, above=3.0):
    """The state after these batches, and after each how many steps have been skipped."""
    optimizer = optax.adam(1e-3)
    step = jax.jit(make_train_step(TwoTerms(), LINE, optimizer, 1, skip_spikes_above=above))
    state, skipped = state_of(optimizer), []
    for batch in given:
        state, report = step(state, batch)
        skipped.append(int(report.skipped))
    return state, skipped


@pytest.mark.slow
def test_a_spike_is_left_out_as_if_its_batch_had_not_been_there():
    at = {WINDOW + 3, WINDOW + 4, WINDOW + 9}
    state, skipped = train(batches(at))
    kept = [batch for number, batch in enumerate(batches(at)) if number not in at]
    straight, none = train(kept)
    assert_bit_equal(
        (state.params, state.opt_state, state.norm_mean),
        (straight.params, straight.opt_state, straight.norm_mean),
    )
    assert (skipped[WINDOW + 2], skipped[-1], none[-1]) == (0, 3, 0)
    assert (state.step, state.consecutive_skips) == (UPDATES, 0)


@pytest.mark.slow
def test_nothing_is_a_spike_before_there_is_a_mean_to_go_by_or_if_nobody_asks():
    assert train(batches({WINDOW - 1}))[1][-1] == 0
    assert train(batches({WINDOW + 3}), above=None)[1][-1] == 0
    assert train(batches({WINDOW + 3}), above=1e9)[1][-1] == 0


def test_the_mean_is_of_all_at_first_and_then_forgets():
    mean, norms = jnp.zeros(()), np.random.default_rng(0).uniform(1, 2, WINDOW).astype(np.float32)
    for updates, norm in enumerate(norms):
        mean = renewed_mean(norm, mean, jnp.int32(updates))
    np.testing.assert_allclose(mean, norms.mean(), rtol=1e-5)
    assert renewed_mean(jnp.float32(mean + 1), mean, jnp.int32(500)) == pytest.approx(mean + 0.01)
    assert is_spike(3.1 * mean, mean, jnp.int32(WINDOW), 3.0)
    assert not is_spike(2.9 * mean, mean, jnp.int32(WINDOW), 3.0)
    assert not is_spike(3.1 * mean, mean, jnp.int32(WINDOW - 1), 3.0)


def test_a_mean_that_a_checkpoint_does_not_have_starts_with_the_next_norm():
    none, norm, updates = jnp.float32(0), jnp.float32(1.5), jnp.int32(5000)
    assert not is_spike(norm, none, updates, 3.0)
    assert renewed_mean(norm, none, updates) == norm


def test_too_many_spikes_in_a_row_end_the_run_with_a_sentence(caplog):
    step_metrics = new_step_metrics(CONFIG)
    for in_a_row in (1, 2, 3):
        report = dataclasses.replace(good(grad_norm=70.0), consecutive_skips=np.int32(in_a_row))
        step_metrics.sent(report)
        if in_a_row < 3:
            step_metrics.fetch_previous()
    assert "a step was skipped: its gradients are a spike (norm 70; see" in caplog.text
    with pytest.raises(UserError, match="gradients of 3 steps in a row are a spike"):
        step_metrics.fetch_previous()


def test_a_factor_that_would_skip_everything_is_refused():
    with pytest.raises(ValueError, match="skip_spikes_above is 1.0; it must be greater than 1"):
        dataclasses.replace(CONFIG, skip_spikes_above=1.0)
