"""Looking into a run without changing what it computes: traces and programs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.storage.workdir import write_text


@dataclass(frozen=True)
class Profiling:
    """What ``train`` is asked to leave behind besides the run itself."""

    profile: tuple[int, int] | None = None
    """First and last step of a trace by JAX's profiler, in ``profile/`` of the workdir."""
    hlo: str | os.PathLike[str] | None = None
    """A folder for the text of each phase's step, as lowered and as compiled."""


class Watch:
    """The probes of one phase, in ``workdir``; used as a context manager around its steps.

    Traces and texts are left by process 0.
    """

    def __init__(self, probes: Profiling, workdir: epath.Path, phase: int) -> None:
        self._probes, self._workdir, self._phase = probes, workdir, phase
        self._is_first, self._tracing = True, False

    def before(self, step: int, train_step: jax.stages.Wrapped, state: Any, batch: Any) -> None:
        """Call before ``step`` (counted from 1) is sent to the devices."""
        profile, is_writer = self._probes.profile, jax.process_index() == 0
        if self._is_first and self._probes.hlo is not None:
            # By all processes, as some backends compile together; written by one.
            with watchdog.phase("compile"):
                lowered = train_step.lower(state, batch)
                texts = {"lowered": lowered.as_text(), "compiled": lowered.compile().as_text()}
            for name, text in texts.items() if is_writer else ():
                file = f"train_step_phase{self._phase}_{name}.txt"
                write_text(epath.Path(self._probes.hlo) / file, str(text))
        if profile is not None and is_writer and profile[0] <= step <= profile[1]:
            if not self._tracing:
                jax.profiler.start_trace(os.fspath(self._workdir / "profile"))
                self._tracing = True
        elif self._tracing:
            self._end_trace(state)
        self._is_first = False

    def _end_trace(self, state: Any) -> None:
        jax.block_until_ready(state)  # the last step may still run
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tracing:
            self._end_trace(None)
