"""What a program can observe of training: callbacks, sinks and evaluators."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.training.config import AnyPhase
from flax_transformers.training.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What an evaluator is given: the run after ``step`` steps."""

    step: int
    params: Any
    """Of the model: their average if one is kept (``config.ema``), with adapters merged."""
    phase: AnyPhase
    mesh: Mesh
    functions: ModelFunctions
    evaluation_step: Callable[..., Any]
    """Compiled ``(params, batch) -> {name: (sum, count)}`` for batches on the mesh."""


Evaluator = Callable[[Snapshot], dict[str, float]]
"""Scores of a snapshot by name, "eval/loss" ...; the same in every process."""


class Callback:
    """Base class of callbacks; override the events you need.

    Every process calls its callbacks, in the order in which they were given. An exception in one
    ends training and reaches the caller of ``train`` or ``Trainer.fit``; ``on_train_end`` is called
    all the same. The arrays of a ``state`` are donated to the next step: copy what is kept longer.
    """

    stop_reason: str | None = None
    """Why this callback wants training to end, or None."""

    def stop(self, reason: str) -> None:
        """Requests that training saves a checkpoint and ends, with exit code 0; call it in an
        event. The ``reason`` is logged as a warning. In a job of several processes one of them may
        call it alone: all end after the same step."""
        self.stop_reason = reason

    def on_train_begin(self, step: int, total_steps: int) -> None:
        """Before the first step; ``step`` steps were taken already, by the run that is resumed."""

    def on_step(self, step: int, state: TrainState) -> None:
        """After step ``step``, counted from 1, was sent to the devices, without waiting for it."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Means of the steps since the last row of metrics ("train/loss" ...), and speeds."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scores of an evaluation ("eval/loss" ...)."""

    def on_checkpoint(self, step: int, folder: epath.Path) -> None:
        """A checkpoint of ``step`` is being written to ``folder``, in the background."""

    def on_train_end(self, step: int) -> None:
        """After the last step, a requested stop, or an exception."""


class Listeners:
    """The callbacks of a run and, in process 0 alone, its sinks.

    ``sinks`` are open during the whole of training. Those that ``open_sinks`` gives, for rows after
    a step, are opened where the run starts or resumes, and again after a rollback.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback] = (),
        sinks: Sequence[MetricSink] = (),
        open_sinks: Callable[[int], Sequence[MetricSink]] = lambda step: (),
    ) -> None:
        is_writer = jax.process_index() == 0
        self._callbacks = callbacks
        self._sinks = self._lasting = list(sinks) if is_writer else []
        self._open_sinks = open_sinks if is_writer else lambda step: ()
        self._last_step = 0

    @property
    def stop_reason(self) -> str | None:
        """Why a callback wants training to end, or None."""
        return next((c.stop_reason for c in self._callbacks if c.stop_reason is not None), None)

    @contextlib.contextmanager
    def training(self, step: int, total_steps: int) -> Iterator[None]:
        """Around the whole of training, which ``on_train_begin`` and ``on_train_end`` enclose."""
        self._last_step = step
        begun: list[Callback] = []
        with _opened(self._lasting):
            try:
                for callback in self._callbacks:
                    begun.append(callback)
                    callback.stop_reason = None  # of an earlier run
                    callback.on_train_begin(step, total_steps)
                yield
                while begun:
                    begun.pop(0).on_train_end(self._last_step)
            except BaseException:
                for callback in begun:
                    try:
                        callback.on_train_end(self._last_step)
                    except Exception as error:  # must not hide the exception that ended training
                        log.warning("on_train_end of %s failed too (%r)", callback, error)
                raise

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Around the steps after ``step``, up to the end of training or a rollback."""
        with _opened(self._open_sinks(step)) as opened:
            self._sinks = [*opened, *self._lasting]
            yield

    def step(self, step: int, state: TrainState) -> None:
        """After each step."""
        self._last_step = step
        for sink in self._sinks:
            sink.step(step)
        for callback in self._callbacks:
            callback.on_step(step, state)

    def metrics(self, step: int, row: Mapping[str, float], *, scores: bool = False) -> None:
        """A row of training metrics, or of an evaluation's ``scores``."""
        for sink in self._sinks:
            sink.write(step, row)
        for callback in self._callbacks:
            (callback.on_evaluation if scores else callback.on_metrics)(step, row)

    def flush(self) -> None:
        """Before a checkpoint: metrics of the steps that it holds must outlive this process."""
        for sink in self._sinks:
            sink.flush()

    def checkpoint(self, step: int, folder: epath.Path) -> None:
        """A checkpoint that is being written."""
        for callback in self._callbacks:
            callback.on_checkpoint(step, folder)


@contextlib.contextmanager
def _opened(sinks: Sequence[MetricSink]) -> Iterator[Sequence[MetricSink]]:
    """The sinks, which are closed at the end."""
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(sink)
        yield sinks
