"""Requests to stop: SIGTERM from a scheduler, Ctrl-C, or a callback."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax

from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.parallel.distributed import of_all_processes
from flax_transformers.parallel.watchdog import watchdog

log = logging.getLogger(__name__)


class StopRequest:
    """While active, SIGTERM and the first Ctrl-C request that the loop saves and ends.

    In a job of several processes the scheduler may signal only some of them; JAX's preemption
    service then makes all stop after the same step. A second Ctrl-C interrupts at once. If the
    loop does not reach its next step, the watchdog ends the job.
    """

    def __init__(self) -> None:
        self.requested = False
        self.obeyed = False
        self.reason: str | None = None
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def check(self, checkpoints: Checkpoints, step: int, reason: str | None = None) -> bool:
        """Whether to save and end after ``step``; call after every step on every process.

        ``reason`` is that of a callback that requests it. The answer is kept in ``obeyed``: a later
        request waits for the next step, so that no run ends without a checkpoint.
        """
        if reason is not None and self.reason is None:
            self.reason = reason
            log.warning("a callback stops the run at step %d: %s", step, reason)
            self._request()
        if jax.process_count() > 1:
            self.requested = checkpoints.reached_preemption(step)
        self.obeyed = self.requested
        if self.obeyed:
            watchdog.acknowledge()
        return self.obeyed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self._request()

    def by_callback(self) -> bool:
        """Whether a callback in any process requested the stop; call on every process."""
        return bool(of_all_processes(self.reason is not None).any())

    def _request(self) -> None:
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which the preemption service tells the others
        else:
            self.requested = True

    def __enter__(self) -> Self:
        # With several processes SIGTERM belongs to JAX's preemption service.
        alone = jax.process_count() == 1
        if threading.current_thread() is threading.main_thread():
            watchdog.ignore_signals()  # until the handlers that it calls are there
            for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._on_signal)
            watchdog.listen()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._previous:
            watchdog.ignore_signals()
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            watchdog.listen()
            watchdog.acknowledge()  # the loop has ended: its request holds no longer
