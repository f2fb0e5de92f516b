"""Metric sinks: where the rows of metrics of a run are written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Protocol, Self, runtime_checkable

from etils import epath


class MetricSink:
    """Base class of sinks; override ``write``, and the other methods as needed.

    Process 0 alone has sinks. Metrics are host numbers by name ("train/loss", "eval/accuracy",
    "perf/step_time_s" ...) for the state after ``step`` steps. Used as a context manager, which
    `Trainer.fit` enters again where it is given the same sink again.
    """

    def step(self, step: int) -> None:
        """Called after every step, with or without metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one row of metrics."""
        raise NotImplementedError(f"{type(self).__name__} has no method write(step, metrics)")

    def flush(self) -> None:
        """Writes everything out; called before a checkpoint."""

    def close(self) -> None:
        """Called at the end of training."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # A close that fails must not hide the exception that ended the run.
        with contextlib.suppress(*() if error is None else (Exception,)):
            self.close()


@runtime_checkable  # so that the command line knows the fields of one
class SinkConfig(Protocol):
    """A sink in a config file: a frozen dataclass of the user's own, in ``logging.sinks``."""

    def open(self, workdir: epath.Path, start_step: int) -> MetricSink:
        """The sink of a run in ``workdir`` that starts, or resumes, after ``start_step`` steps.

        Rows of later steps that an interrupted run wrote there should be dropped or hidden.
        """
        ...
