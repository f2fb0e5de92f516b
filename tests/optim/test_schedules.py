"""Learning-rate schedules at named steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from flax_transformers.errors import UserError
from flax_transformers.optim.schedules import Schedule


@pytest.mark.parametrize(("step", "factor"), [(1, 1e-4), (999_999, 1 / 990_000)])
def test_rates_next_to_zero_are_as_accurate_as_the_peak(step, factor):
    rate = Schedule("linear", warmup_steps=10_000).make(1e-4, 1_000_000)
    assert float(rate(step)) == pytest.approx(1e-4 * factor, rel=5e-7)


def test_constant_rises_from_zero_to_the_peak_and_stays_there():
    rate = Schedule("constant", warmup_steps=4).make(2.0, 100)
    assert [float(rate(step)) for step in (0, 1, 2, 4, 5, 99, 1000)] == [0, 0.5, 1, 2, 2, 2, 2]


def test_linear_is_a_triangle_that_ends_at_zero():
    rate = Schedule("linear", warmup_steps=2).make(8.0, 10)
    values = [float(rate(step)) for step in (0, 1, 2, 4, 6, 8, 10, 11)]
    assert values == [0, 4, 8, 6, 4, 2, 0, 0]


def test_linear_ends_at_the_stated_fraction_of_the_peak():
    rate = Schedule("linear", end_fraction=0.25).make(4.0, 8)
    assert [float(rate(step)) for step in (0, 4, 8, 20)] == [4, 2.5, 1, 1]


def test_cosine_is_half_a_period_from_the_peak_to_the_end():
    rate = Schedule("cosine", warmup_steps=4, end_fraction=0.5).make(2.0, 12)
    expected = {0: 0.0, 2: 1.0, 4: 2.0, 6: 1.5 + 0.5 * math.sqrt(0.5), 8: 1.5, 12: 1.0, 50: 1.0}
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, rel=2e-7, abs=0)


def test_cosine_restarts_at_the_peak_after_each_cycle():
    once = Schedule("cosine", end_fraction=0.1).make(2.0, 4)
    rate = Schedule("cosine", warmup_steps=2, end_fraction=0.1, cycles=3).make(2.0, 14)
    found = [float(rate(step)) for step in range(2, 14)]
    assert found == [float(once(step % 4)) for step in range(12)]
    assert float(rate(14)) == float(rate(99)) == pytest.approx(0.2)


def test_many_cycles_of_a_long_run_do_not_overflow():
    steps, cycles = 4_000_000, 1000
    rate = jax.jit(Schedule("cosine", cycles=cycles).make(1.0, steps))
    once = Schedule("cosine").make(1.0, steps)
    for step in (2_147, 2_148_000, 3_000_100, steps - 1):
        expected = once(jnp.int32(step * cycles % steps))
        assert float(rate(step)) == pytest.approx(float(expected), rel=1e-6), step


def test_wsd_stays_at_the_peak_and_falls_in_its_last_steps():
    rate = Schedule("wsd", 2, decay_steps=4, end_fraction=0.5).make(8.0, 12)
    values = [float(rate(step)) for step in range(14)]
    assert values == [0, 4, 8, 8, 8, 8, 8, 8, 8, 7, 6, 5, 4, 4]
    tenth = Schedule("wsd").make(1.0, 100)
    assert [float(tenth(step)) for step in (0, 90, 95, 100)] == [1, 1, 0.5, 0]


def test_inverse_sqrt_quarters_the_steps_to_halve_the_rate():
    rate = Schedule("inverse_sqrt", warmup_steps=16).make(1.0, 10_000)
    assert [float(rate(step)) for step in (0, 8, 16, 64, 1024)] == [0, 0.5, 1, 0.5, 0.125]


def test_inverse_sqrt_with_the_peak_of_the_transformer_is_its_published_formula():
    width, warmup = 512, 4000
    rate = Schedule("inverse_sqrt", warmup_steps=warmup).make((width * warmup) ** -0.5, 100_000)
    for step in (1, 100, 3999, 4000, 4001, 50_000):
        published = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert float(rate(step)) == pytest.approx(published, rel=1e-6)


def test_inverse_sqrt_with_a_timescale_and_no_warmup_is_the_schedule_of_t5():
    rate = Schedule("inverse_sqrt", timescale=10_000).make(0.01, 1_000_000)
    for step in (0, 1, 9_999, 10_000, 40_000, 524_288):
        assert float(rate(step)) == pytest.approx(1 / math.sqrt(max(step, 10_000)), rel=1e-6)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_without_warmup_the_first_rate_is_the_peak(kind):
    assert float(Schedule(kind).make(0.5, 10)(0)) == 0.5


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_a_warmup_as_long_as_the_run_only_rises(kind):
    rate = Schedule(kind, warmup_steps=8).make(8.0, 8)
    assert [float(rate(step)) for step in range(8)] == list(range(8))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_the_rate_is_float32_and_the_same_traced_or_not(kind):
    rate = Schedule(kind, warmup_steps=3).make(1e-3, 20)
    for step in (0, 2, 3, 7, 19):
        traced = jax.jit(rate)(jnp.int32(step))
        assert traced.dtype == rate(step).dtype == jnp.float32
        assert float(traced) == pytest.approx(float(rate(step)), rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "peak", "total", "names"),
    [
        (
            lambda: Schedule("linear", warmup_steps=11),
            1.0,
            10,
            "warmup_steps is 11, but .* 10 steps",
        ),
        (lambda: Schedule("linear", warmup_steps=-1), 1.0, 10, "warmup_steps is -1"),
        (lambda: Schedule("linear"), 0.0, 10, "learning rate is 0.0"),
        (lambda: Schedule("linear"), math.nan, 10, "learning rate is nan"),
        (lambda: Schedule("linear"), 1.0, 0, "training steps is 0"),
        (lambda: Schedule("cosine", end_fraction=1.5), 1.0, 10, "end_fraction is 1.5"),
        (lambda: Schedule("constant", end_fraction=0.1), 1.0, 10, "constant schedule has no end"),
        (lambda: Schedule("inverse_sqrt"), 1.0, 10, "timescale on, which is 0"),
        (lambda: Schedule("inverse_sqrt", 5, timescale=4), 1.0, 10, "which is 4; .* at least 5"),
        (lambda: Schedule("cosine", timescale=4), 1.0, 10, "inverse_sqrt .* to None for cosine"),
        (lambda: Schedule("cosine", decay_steps=4), 1.0, 10, "only the wsd schedule"),
        (lambda: Schedule("linear", cycles=2), 1.0, 10, "cycles is 2, but only the cosine"),
        (lambda: Schedule("wsd", 4, decay_steps=7), 1.0, 10, "is 7, but the run has 6 steps after"),
        (
            lambda: Schedule("polynomial"),
            1.0,
            10,
            "'polynomial'; it must be 'constant', ",
        ),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(schedule, peak, total, names):
    with pytest.raises(UserError, match=names):
        schedule().make(peak, total)
