"""Learning-rate schedules: a warm-up, then one of five shapes.

``rate(step)`` is the rate of the update that turns the parameters after ``step`` updates into those
after ``step + 1``, so steps count from 0 and run to ``total_steps - 1``. With a warm-up the rate at
step 0 is exactly 0, as in the original BERT code and in torch's ``LambdaLR`` driven by
``get_linear_schedule_with_warmup``: the very first update only fills the optimizer's moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_transformers import ranges

LEARNING_RATE = ranges.numbers(0, 1000, above=True)


@runtime_checkable  # so that tyro reads the fields of the schedule in a config
class ScheduleFactory(Protocol):
    """What ``optimizer.schedule`` may be: any frozen dataclass that makes an optax schedule."""

    def make(self, peak: float, total_steps: int) -> optax.Schedule:
        """The function from step, counted from 0, to learning rate, at most ``peak``."""
        ...


@dataclass(frozen=True)
class Schedule:
    """The shape of the learning rate over a run, as a factor of its peak.

    With W = ``warmup_steps``, N the total number of steps and e = ``end_fraction``, every kind
    rises as ``step / W`` over the first W steps and then follows

    - ``constant``: 1.
    - ``linear``: from 1 at step W down to e at step N in a straight line (BERT, arXiv:1810.04805).
      The original code counts the descent from step 0, so its rate drops by the factor
      ``1 - W/N`` at the end of the warm-up; here, as in Hugging Face, it is continuous.
    - ``cosine``: ``e + (1 - e) * (1 + cos(pi * (step - W) / (N - W))) / 2``, half a period; with
      ``cycles`` C that many such descents, each over ``(N - W) / C`` steps (SGDR,
      arXiv:1608.03983).
    - ``wsd``: 1 up to step N - D, then down to e at step N in a straight line, with D =
      ``decay_steps`` (warm-up, stable, decay: MiniCPM, arXiv:2404.06395).
    - ``inverse_sqrt``: ``sqrt(K / max(step, K))`` with K = ``timescale``, W where left out.
      K = W is the Transformer's (arXiv:1706.03762 §5.3); W = 0 and K = 10,000 is T5's
      (arXiv:1910.10683 §3.1.2), flat for K steps.

    After step N the rate stays at its last value (``inverse_sqrt`` keeps falling).
    """

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "linear"
    warmup_steps: int = 0
    end_fraction: float = 0.0
    timescale: int | None = None
    decay_steps: int | None = None
    """Of ``wsd``; None: a tenth of the run."""
    cycles: int = 1

    RANGES: ClassVar[ranges.Ranges] = {
        "warmup_steps": ranges.integers(0),
        "end_fraction": ranges.SHARE,
        "timescale": ranges.integers(),
        "decay_steps": ranges.integers(),
        "cycles": ranges.integers(1, 10_000),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "optimizer.schedule")
        if self.end_fraction and self.kind not in ("linear", "cosine", "wsd"):
            raise ranges.OutOfRange(
                f"optimizer.schedule.end_fraction is {self.end_fraction}, but a {self.kind} "
                "schedule has no end value; set it to 0, or choose linear, cosine or wsd"
            )
        for name, kind in (
            ("timescale", "inverse_sqrt"),
            ("decay_steps", "wsd"),
            ("cycles", "cosine"),
        ):
            given = getattr(self, name)
            if self.kind != kind and given != getattr(Schedule, name):
                raise ranges.OutOfRange(
                    f"optimizer.schedule.{name} is {given}, but only the {kind} schedule uses it; "
                    f"set it to {getattr(Schedule, name)} for {self.kind}"
                )
        start = self.timescale or self.warmup_steps
        if self.kind == "inverse_sqrt" and start < max(1, self.warmup_steps):
            raise ranges.OutOfRange(
                "an inverse_sqrt schedule falls from step optimizer.schedule.timescale on, which "
                f"is {start}; set it, or optimizer.schedule.warmup_steps when it is left out, to "
                f"at least {max(1, self.warmup_steps)}"
            )

    def make(self, peak: float, total_steps: int) -> optax.Schedule:
        """The function from step (int, Python or int32 array) to learning rate (float32 scalar).

        Raises OutOfRange for a peak or a number of steps that is out of range, and for a warm-up
        that is longer than the run.
        """
        ranges.check_number("the learning rate", peak, LEARNING_RATE)
        ranges.check_number("the number of training steps", total_steps, ranges.integers())
        warmup = self.warmup_steps
        if warmup > total_steps:
            raise ranges.OutOfRange(
                f"optimizer.schedule.warmup_steps is {warmup}, but the run has {total_steps} steps "
                "in all; lower it, or raise the steps of phases"
            )
        # A warm-up as long as the run leaves nothing to decay over; one step keeps optax content.
        decay_steps = max(1, total_steps - warmup)
        if self.kind == "constant":
            after = optax.constant_schedule(peak)
        elif self.kind == "linear":
            after = _line(peak, peak * self.end_fraction, decay_steps)
        elif self.kind == "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=self.end_fraction)
            if self.cycles > 1:
                after = _repeated(after, self.cycles, decay_steps)
        elif self.kind == "wsd":
            last = self.decay_steps or min(max(1, total_steps // 10), decay_steps)
            if last > decay_steps:
                raise ranges.OutOfRange(
                    f"optimizer.schedule.decay_steps is {last}, but the run has {decay_steps} "
                    "steps after its warm-up; lower it, or raise the steps of phases"
                )
            fall = _line(peak, peak * self.end_fraction, last)
            after = lambda step: fall(step - (decay_steps - last))  # noqa: E731
        else:
            after = _inverse_sqrt(peak, self.timescale or warmup, warmup)
        if warmup:
            after = optax.join_schedules([_line(0.0, peak, warmup), after], [warmup])
        return lambda step: jnp.asarray(after(step), jnp.float32)


def _line(start: float, end: float, steps: int) -> optax.Schedule:
    """From ``start`` to ``end`` in ``steps`` steps, then ``end``.

    Weighting both ends keeps small rates accurate: ``optax.linear_schedule`` subtracts float32
    numbers near the peak, which leaves step 1 of a 10,000-step warm-up 6e-4 off.
    """

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.clip(count, 0, steps)
        return start * ((steps - count) / steps) + end * (count / steps)

    return rate


def _repeated(once: optax.Schedule, cycles: int, steps: int) -> optax.Schedule:
    """``once``, a schedule over ``steps``, run through ``cycles`` times in as many steps."""
    # ``count * cycles % steps`` without that product, which an int32 may not hold: steps since the
    # start of the cycle, and where in it the start, a whole step, falls.
    cycle = np.arange(cycles, dtype=np.int64)
    starts = -(-cycle * steps // cycles)
    offsets = starts * cycles - cycle * steps

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        number = jnp.searchsorted(starts.astype(np.int32), count, side="right") - 1
        start, offset = (jnp.asarray(each, jnp.int32)[number] for each in (starts, offsets))
        return once(jnp.where(count < steps, (count - start) * cycles + offset, steps))

    return rate


def _inverse_sqrt(peak: float, timescale: int, offset: int) -> optax.Schedule:
    """``peak * sqrt(timescale / max(step, timescale))``, with ``step - offset`` handed in."""
    return lambda count: peak * jnp.sqrt(timescale / jnp.maximum(count + offset, timescale))
