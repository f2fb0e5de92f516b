"""Learning-rate schedules: a warm-up, then one of four shapes.

``rate(step)`` is the rate of the update that turns the parameters after ``step`` updates into those
after ``step + 1``, so steps count from 0 and run to ``total_steps - 1``. With a warm-up the rate at
step 0 is exactly 0, as in the original BERT code and in torch's ``LambdaLR`` driven by
``get_linear_schedule_with_warmup``: the very first update only fills the optimizer's moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from flax_transformers.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The shape of the learning rate over a run, as a factor of its peak.

    With W = ``warmup_steps``, N the total number of steps and e = ``end_fraction``, every kind
    rises as ``step / W`` over the first W steps and then follows

    - ``constant``: 1.
    - ``linear``: from 1 at step W down to e at step N in a straight line (BERT, arXiv:1810.04805).
      The original code counts the descent from step 0, so its rate drops by the factor
      ``1 - W/N`` at the end of the warm-up; here, as in Hugging Face, it is continuous.
    - ``cosine``: ``e + (1 - e) * (1 + cos(pi * (step - W) / (N - W))) / 2``, half a period and no
      restarts (SGDR, arXiv:1608.03983).
    - ``inverse_sqrt``: ``sqrt(K / max(step, K))`` with K = ``timescale``, W where left out.
      K = W is the Transformer's (arXiv:1706.03762 §5.3); W = 0 and K = 10,000 is T5's
      (arXiv:1910.10683 §3.1.2), flat for K steps.

    After step N the rate stays at its last value (``inverse_sqrt`` keeps falling).
    """

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    warmup_steps: int = 0
    end_fraction: float = 0.0
    timescale: int | None = None


def make_schedule(config: Schedule, peak: float, total_steps: int) -> optax.Schedule:
    """The function from step (int, Python or int32 array) to learning rate (float32 scalar).

    Raises UserError for settings that contradict each other, are out of range, or that the kind
    would ignore.
    """
    _check(config, peak, total_steps)
    warmup = config.warmup_steps
    # A warm-up as long as the run leaves nothing to decay over; one step keeps optax content.
    decay_steps = max(1, total_steps - warmup)
    if config.kind == "constant":
        after = optax.constant_schedule(peak)
    elif config.kind == "linear":
        after = _line(peak, peak * config.end_fraction, decay_steps)
    elif config.kind == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_fraction)
    else:
        after = _inverse_sqrt(peak, config.timescale or warmup, warmup)
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


def _inverse_sqrt(peak: float, timescale: int, offset: int) -> optax.Schedule:
    """``peak * sqrt(timescale / max(step, timescale))``, with ``step - offset`` handed in."""
    return lambda count: peak * jnp.sqrt(timescale / jnp.maximum(count + offset, timescale))


def _check(config: Schedule, peak: float, total_steps: int) -> None:
    kind, warmup, timescale = config.kind, config.warmup_steps, config.timescale
    kinds = ("constant", "linear", "cosine", "inverse_sqrt")
    if kind not in kinds:
        raise UserError(f"schedule.kind is {kind!r}; choose one of {', '.join(kinds)}.")
    if total_steps < 1:
        raise UserError(f"the number of training steps is {total_steps}; it must be at least 1.")
    if not 0 < peak < float("inf"):
        raise UserError(f"the learning rate is {peak}; it must be a positive number.")
    if not 0 <= warmup <= total_steps:
        raise UserError(
            f"schedule.warmup_steps is {warmup}; with {total_steps} training steps it must lie "
            f"between 0 and {total_steps}."
        )
    if not 0 <= config.end_fraction <= 1:
        raise UserError(
            f"schedule.end_fraction is {config.end_fraction}; it is a fraction of the peak "
            "learning rate and must lie between 0 and 1."
        )
    if config.end_fraction and kind not in ("linear", "cosine"):
        raise UserError(
            f"schedule.end_fraction is {config.end_fraction}, but a {kind} schedule has no end "
            "value; set it to 0, or choose linear or cosine."
        )
    if kind != "inverse_sqrt":
        if timescale is not None:
            raise UserError(
                f"schedule.timescale is {timescale}, but only the inverse_sqrt schedule uses it; "
                f"leave it out for {kind}."
            )
    elif (timescale if timescale is not None else warmup) < max(1, warmup):
        raise UserError(
            f"an inverse_sqrt schedule falls from step schedule.timescale on, which is "
            f"{warmup if timescale is None else timescale}; set it, or schedule.warmup_steps when "
            f"it is left out, to at least {max(1, warmup)}."
        )
