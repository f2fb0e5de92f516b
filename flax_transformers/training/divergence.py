"""Which states a run may resume from, and how it may end, where values are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.monitoring.throughput import REMEDY
from flax_transformers.optim.finite import is_finite
from flax_transformers.training.state import TrainState

log = logging.getLogger(__name__)

_ELSEWHERE = "train in another --workdir"


def is_not_finite(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Why a run cannot resume from a checkpoint, if so."""
    if meta.get("consecutive_skips") == 0:  # tested by the step before it was saved
        return None
    finite = jax.jit(is_finite)(state.params, state.opt_state, state.ema)
    return None if finite else "holds values that are not finite"


def is_unproven(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Why a run cannot roll back to a checkpoint, if so."""
    if int(state.skipped_in_a_row):
        return "was saved while steps were being skipped"
    return is_not_finite(state, meta)


def require_finite_end(
    workdir: epath.Path, step: int, metrics: Mapping[str, float], skips: int
) -> None:
    """Raises UserError if a run that is through has no finite loss at its end.

    ``metrics`` are the last values, and ``skips`` the steps in a row, up to the last one, that were
    skipped for values that are not finite.

    That is: no step had a finite loss, more than the last step was skipped for values that are not
    finite, or a loss in the last metrics is not finite. Where the last step alone was skipped, the
    parameters are those of the step before, whose loss is finite: a warning says so. What the run
    ended with is saved in every case, so that running it again ends the same way.
    """
    where = f"the run in {workdir} ended at step {step}"
    if skips and "train/loss" not in metrics:
        raise UserError(
            f"{where} without a finite loss: every step was skipped; {REMEDY}, and {_ELSEWHERE}"
        )
    if skips > 1:
        raise UserError(
            f"{where} without a finite loss: the last {skips} steps were skipped, as their values "
            "are not finite, and its last checkpoint holds the parameters from before them; "
            f"{REMEDY}, and raise phases.*.steps to train further, or {_ELSEWHERE}"
        )
    losses = ("train/loss", "eval/loss")
    wrong = [name for name in losses if not math.isfinite(metrics.get(name, 0.0))]
    if wrong:
        raise UserError(
            f"{where} with {' and '.join(wrong)} not finite: do not use its last checkpoint; "
            f"{REMEDY}, and {_ELSEWHERE}"
        )
    if skips:
        log.warning(
            "the last step, %d, was skipped, as its values are not finite; the last checkpoint "
            "holds the parameters from before it",
            step,
        )
