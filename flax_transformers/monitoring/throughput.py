"""Rows of training metrics: means over steps, learning rate and throughput."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Accumulator, Totals
from flax_transformers.monitoring.mfu import mfu
from flax_transformers.optim.spike_detection import TooManySkipped

log = logging.getLogger(__name__)

REMEDY = "lower optimizer.learning_rate, lengthen the warm-up or use compute.dtype float32"
LOOK_AT = (
    "look at the rows with `flax-transformers inspect`, at ids beyond model.vocab_size or "
    "model.token_types, positions beyond model.max_positions, the weights of init_from, "
    "model.init_std, model.norm_eps and compute.dtype"
)
"""Possible causes of a first step that is not finite."""


Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metric name to (sum, count)."""


@struct.dataclass
class StepReport:
    """Metrics of one step, all scalars on the device.

    ``sums`` are zero for a skipped step. ``grad_norm`` is the norm before clipping.
    ``update_is_finite`` is False where the new parameters or statistics would not be finite.
    """

    sums: Sums
    grad_norm: jax.Array
    skipped: jax.Array
    consecutive_skips: jax.Array
    update_is_finite: Any = True
    updates: Any = 1
    """Steps since the run began that were not skipped."""
    tokens: Any = None
    """Tokens in the batch, without padding; None for images."""

    def means(self) -> dict[str, jax.Array]:
        """Metrics of this step, on the device; NaN where it was skipped or counted nothing."""
        means = {_row_name(name): total / count for name, (total, count) in self.sums.items()}
        return means | {
            "optimizer/grad_norm": self.grad_norm,
            "optimizer/skipped_steps": self.skipped,
        }


class StepMetrics:
    """Collects step reports, one step behind, and makes rows of metrics of them.

    ``batch_size``: the examples of every step for which `sent` has no number. Throughput excludes
    the time in ``paused`` and the first step, which compiles; ``clock`` counts
    all time.

    ``flops_per_step`` are the matmul FLOPs of a whole step (see `model_flops`); without them there
    is no MFU, and without the schedule ``learning_rate`` no rate. More than
    ``max_consecutive_skips`` skipped steps in a row raise TooManySkipped.

    ``totals`` are those of the steps between the last row and the checkpoint that the run resumes
    from, so that its first row averages the same steps as that of an uninterrupted run.
    """

    def __init__(
        self,
        mesh: Mesh,
        clock: Clock,
        totals: Totals | None = None,
        *,
        batch_size: int = 0,
        learning_rate: optax.Schedule | None,
        max_consecutive_skips: int,
        flops_per_step: float | None = None,
    ) -> None:
        self._mesh, self._clock = mesh, clock
        self._batch_size = batch_size
        self._flops_per_step, self._learning_rate = flops_per_step, learning_rate
        self._max_consecutive_skips = max_consecutive_skips
        self._sums = Accumulator(totals)
        self._pending: StepReport | None = None
        self._pending_examples = 0
        self._skipped, self._consecutive_skips = 0, 0
        self._fault = ("", "")
        self._is_first = True
        self._steps, self._examples = 0, 0
        self._tokens: int | None = None
        self._since: float | None = None

    @property
    def totals(self) -> Totals:
        """Sums over the steps fetched since the last row."""
        return self._sums.totals

    @property
    def consecutive_skips(self) -> int:
        """Number of consecutive skipped steps, up to the last one fetched."""
        return self._consecutive_skips

    @property
    def diverging_steps(self) -> int:
        """`consecutive_skips` if the last step was skipped for values that are not finite, else
        0."""
        return self._consecutive_skips if self._fault[1] == "not finite" else 0

    def sent(self, report: StepReport, examples: int | None = None) -> None:
        """Adds the report of the step just dispatched, on so many ``examples``, without waiting for
        it."""
        if self._is_first:
            self._clock.lap("compile")
            self._is_first = False
        self._pending = report
        self._pending_examples = self._batch_size if examples is None else examples

    def fetch_previous(self) -> None:
        """Waits for the step before the one just dispatched, and adds its report to the sums.

        Raises TooManySkipped if too many consecutive steps were skipped.
        """
        if self._pending is None:
            return
        report = jax.device_get(self._pending)
        self._pending = None
        if self._since is None:
            self._since = time.perf_counter()  # the compiling step is over
        else:
            self._steps += 1
            self._examples += self._pending_examples
            if report.tokens is not None:
                self._tokens = (self._tokens or 0) + int(report.tokens)
        sums = dict(report.sums)
        if report.consecutive_skips == 0:
            sums["optimizer/grad_norm"] = (report.grad_norm, 1.0)
        self._sums.add(sums)
        self._skipped = int(report.skipped)
        self._consecutive_skips, self._fault = int(report.consecutive_skips), _fault(report)
        if self._consecutive_skips:
            log.warning("a step was skipped: its %s", " are ".join(self._fault))
        limit = self._max_consecutive_skips
        if self._consecutive_skips > limit:
            what, wrong = self._fault
            if not report.updates:
                raise TooManySkipped(
                    f"the {what} of the first {self._consecutive_skips} steps are {wrong}, and no "
                    f"update has been made: this is no divergence; {LOOK_AT}"
                )
            raise TooManySkipped(
                f"the {what} of {self._consecutive_skips} steps in a row are {wrong}; {REMEDY}, "
                f"and run the same command again: {limit} steps in a row may be skipped "
                "(max_consecutive_skips), and training resumes from the newest checkpoint before "
                "them"
            )

    def row(self, step: int) -> dict[str, float]:
        """Metrics of the steps after the last row up to ``step``; waits for the last of them.

        After a resume they include the steps before the checkpoint, except in throughput.
        """
        self.fetch_previous()
        row = {_row_name(name): value for name, value in self._sums.means().items()}
        if self._learning_rate is not None:
            row["optimizer/learning_rate"] = float(self._learning_rate(step - 1 - self._skipped))
        row["optimizer/skipped_steps"] = self._skipped
        self._clock.lap("steps")
        row |= self._speed() | self._clock.row()
        self._sums.reset()
        self._steps, self._examples, self._tokens = 0, 0, None
        self._since = time.perf_counter()
        return row

    def _speed(self) -> dict[str, float]:
        if not self._steps or self._since is None:
            return {}
        seconds = time.perf_counter() - self._since
        step_time = seconds / self._steps
        speed = {
            "perf/step_time_s": step_time,
            "perf/examples_per_second": self._examples / seconds,
        }
        if self._tokens is not None:
            speed["perf/tokens_per_second"] = self._tokens / seconds
        device, count = self._mesh.devices.flat[0], self._mesh.devices.size
        if self._flops_per_step is not None:
            utilisation = mfu(self._flops_per_step, step_time, device.device_kind, count)
            if utilisation is not None:
                speed["perf/mfu"] = utilisation
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return speed if memory is None else speed | {"perf/device_memory_gib": memory / 2**30}

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Excludes the time of its body, such as an evaluation, from throughput."""
        self.fetch_previous()
        start = time.perf_counter()
        self._clock.lap("steps")
        yield
        self._clock.lap(kind)
        if self._since is not None:
            self._since += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch; it counts as ``data_wait`` only while the device is idle."""
        self._clock.lap("start" if self._is_first else "steps")
        yield
        busy = self._pending is not None and not cast(Any, self._pending.grad_norm).is_ready()
        self._clock.lap("steps" if busy else "data_wait")


def _row_name(name: str) -> str:
    """The name of a metric of the objective or the step in a row."""
    return name if "/" in name else f"train/{name}"


def _fault(report: StepReport) -> tuple[str, str]:
    """Why a step was skipped: which of its values were wrong, and how."""
    if not np.isfinite(report.grad_norm):
        return "gradients", "not finite"
    if not report.update_is_finite:
        return "new parameters or optimizer statistics", "not finite"
    return "gradients", f"a spike (norm {float(report.grad_norm):.3g}; see skip_spikes_above)"
