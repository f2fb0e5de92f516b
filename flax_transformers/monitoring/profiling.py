"""Traces and compiled programs of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

import jax
from etils import epath

from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.storage.workdir import write_text


@dataclass(frozen=True)
class Profiling:
    """What ``train`` writes for profiling."""

    profile: tuple[int, int] | None = None
    """First and last step of a trace by JAX's profiler, in ``profile/`` of the workdir."""
    hlo: str | os.PathLike[str] | None = None
    """A folder for the text of each phase's step, as lowered and as compiled."""


class Watch:
    """Writes the profiles of one phase to ``workdir``, by process 0; a context manager around its
    steps."""

    def __init__(self, profiling: Profiling, workdir: epath.Path, phase: int) -> None:
        self._profiling, self._workdir, self._phase = profiling, workdir, phase
        self._is_first, self._tracing = True, False

    def before(self, step: int, train_step: jax.stages.Wrapped, state: Any, batch: Any) -> None:
        """Call before ``step``, counted from 1, is dispatched."""
        profile, is_writer = self._profiling.profile, jax.process_index() == 0
        if self._is_first and self._profiling.hlo is not None:
            # All processes compile, as some backends need; one writes.
            with watchdog.phase("compile"):
                lowered = train_step.lower(state, batch)
                texts = {"lowered": lowered.as_text(), "compiled": lowered.compile().as_text()}
            for name, text in texts.items() if is_writer else ():
                file = f"train_step_phase{self._phase}_{name}.txt"
                write_text(epath.Path(self._profiling.hlo).expanduser() / file, str(text))
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

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._tracing:
            self._end_trace(None)
