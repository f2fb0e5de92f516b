"""One watchdog thread per process: a job that is stuck ends, with its stacks and a reason.

The main thread says which phase it is in (``with watchdog.phase("data")``); the watchdog compares
that with ``Limits``. It needs nothing of the main thread, which may be blocked in C++ or in a
collective (only C code that never releases the interpreter lock keeps the watchdog waiting). It
also hears SIGTERM and Ctrl-C at once, which Python's own handlers, run by the main thread, do not.

In a job of several processes the watchdogs publish their phases to each other, so that each can
name the process that all wait for, and one that ends the job is followed by all others.
This module does not import jax.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flax_transformers.parallel.limits import DOING, Limits

RESTART = 75
"""Exit code of a job that is to be started again as a whole."""
TICK_SECONDS = 0.5
SUSPENDED_SECONDS = 5.0
"""A tick that is late by more than this means that this process was suspended or starved."""
_REPORT_SECONDS = 10.0  # for stderr that nobody reads
_DUMPED_PHASES = ("data", "step")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NAMED_AT_MOST = 8


class Peers(Protocol):
    """A key-value store that all processes of the job share."""

    index: int
    count: int

    def put(self, folder: str, value: str) -> None:
        """Sets the value of this process in ``folder``."""

    def values(self, folder: str) -> dict[int, str]:
        """The values in ``folder``, by index of the process."""


@dataclass(frozen=True)
class _Current:
    """The phase that a process is in."""

    name: str
    since: float
    """Monotonic time of its beginning, or of the last sign of progress."""
    number: int
    """Phases begun or returned to so far. Equal code does so equally often in all processes, so the
    one with the lowest number is behind."""
    explain: Callable[[], str] | None = None


class Watchdog:
    """The phases of this process, and the thread that watches them once it is started."""

    def __init__(self) -> None:
        self.limits, self.dump_seconds = Limits(), 0.0
        self.name = "this process"
        self._peers: Peers | None = None
        self._current: _Current | None = None
        self._entered = 0
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._pipes: dict[int, tuple[int, int]] = {}
        self._listening = False
        self._told: tuple[str, float] | None = None
        self._dumped = 0

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    def start(self, limits: Limits, dump_seconds: float = 0.0) -> None:
        """Begins to watch; where it does already, only sets the limits.

        The stacks of a step or of a wait for data that takes more than ``dump_seconds`` (0: never)
        go to stderr once, before any limit.
        """
        self.limits, self.dump_seconds = limits, dump_seconds
        if self._thread is None:
            self._stopping, self._told = False, None
            self._pipes = {number: _pipe() for number in _SIGNALS}
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            self.listen()

    def stop(self) -> None:
        """Ends the thread; phases are no longer limited."""
        if self._thread is not None:
            self.be_deaf()
            self._stopping = True
            self._thread.join()
            self._thread = None
            for pipe in self._pipes.values():
                for end in pipe:
                    os.close(end)

    @contextlib.contextmanager
    def running(self, limits: Limits, dump_seconds: float = 0.0) -> Iterator[None]:
        """Around what is to be watched: stops afterwards if it did not run before."""
        ran = self.is_running
        self.start(limits, dump_seconds)
        try:
            yield
        finally:
            if not ran:
                self.stop()

    def join(self, peers: Peers) -> None:
        """Publishes the phases of this process to the others from now on."""
        self.name = f"process {peers.index} of {peers.count}"
        self._peers = peers

    @contextlib.contextmanager
    def phase(self, name: str, explain: Callable[[], str] | None = None) -> Iterator[None]:
        """Around a phase of ``DOING``; the clock of the phase around it begins anew afterwards.

        ``explain`` gives what to say of this phase where its limit has passed.
        """
        before = self._current
        self.enter(name, explain)
        try:
            yield
        finally:
            if before is None:
                self._current = None
            else:
                self._enter(before.name, before.explain)

    def enter(self, name: str, explain: Callable[[], str] | None = None) -> None:
        """As ``phase``, for good."""
        assert name in DOING
        self._enter(name, explain)

    def _enter(self, name: str, explain: Callable[[], str] | None) -> None:
        self._entered += 1
        self._current = _Current(name, time.monotonic(), self._entered, explain)

    def progress(self) -> None:
        """Gives the current phase its whole time again."""
        if self._current is not None:
            self._current = replace(self._current, since=time.monotonic())

    def obeyed(self) -> None:
        """The request to stop was seen by the main thread, which saves now."""
        self._told = None

    def listen(self) -> None:
        """Hears SIGTERM and Ctrl-C, whatever the main thread does; handlers are called as before.

        Call it after handlers were installed, and ``be_deaf`` before.
        """
        if self._thread is None or self._listening:
            return
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                # The only handler that needs no interpreter, and that calls C++ handlers too. What
                # it writes is the signal; the stacks in it are not read.
                faulthandler.register(
                    number, file=self._pipes[number][1], all_threads=False, chain=True
                )
        self._listening = True

    def be_deaf(self) -> None:
        """Puts the handlers back that were there before ``listen``."""
        for number in _SIGNALS if self._listening else ():
            faulthandler.unregister(number)
        self._listening = False

    def _watch(self) -> None:
        expected = time.monotonic() + TICK_SECONDS
        next_exchange = 0.0
        while not self._stopping:
            self._hear(TICK_SECONDS)
            now = time.monotonic()
            late = now - expected
            if late > SUSPENDED_SECONDS:
                self._forgive(late)
            current = self._current
            if current is not None:
                self._check(current, time.monotonic())
            if self._peers is not None and now >= next_exchange:
                self._exchange(self._peers, current, now)
                next_exchange = now + _exchange_seconds(self._peers)
            expected = time.monotonic() + TICK_SECONDS

    def _hear(self, seconds: float) -> None:
        """Waits, and notes signals."""
        readers = {read: number for number, (read, _) in self._pipes.items()}
        for read in select.select(list(readers), [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                while os.read(read, 65536):
                    pass
            if self._told is None:
                self._told = signal.Signals(readers[read]).name, time.monotonic()

    def _forgive(self, late: float) -> None:
        """Time in which this process did not run is no time in a phase."""
        current = self._current
        if current is not None:
            self._current = replace(current, since=current.since + late)
        if self._told is not None:
            self._told = self._told[0], self._told[1] + late

    def _check(self, current: _Current, now: float) -> None:
        seconds, limit = now - current.since, self.limits.of(current.name)
        if limit and seconds > limit:
            reason = f"{self.name} has been {_in_phase(current.name, seconds)}"
            if current.explain is not None:
                reason = f"{self.name} gave up after {seconds:.0f} s: {current.explain()}"
            self._end(
                f"{reason}{self._who_is_behind(current)}; the limit is limits.{current.name}_s = "
                f"{limit:g}, to be raised if this was no hang"
            )
        told, grace = self._told, self.limits.grace_s
        if told and grace and current.name != "save" and now - max(told[1], current.since) > grace:
            self._end(
                f"{self.name} was told to stop ({told[0]}) {now - told[1]:.0f} s ago and cannot "
                f"save: it has been {_in_phase(current.name, seconds)}"
                f"{self._who_is_behind(current)}; the limit is limits.grace_s = {grace:g}"
            )
        if (
            self.dump_seconds
            and seconds > self.dump_seconds
            and current.name in _DUMPED_PHASES
            and self._dumped != current.number
        ):
            self._dumped = current.number
            _write(f"{self.name} has been {_in_phase(current.name, seconds)}; its stacks:")
            faulthandler.dump_traceback(file=2)

    def _exchange(self, peers: Peers, current: _Current | None, now: float) -> None:
        """Tells the others where this process is, and ends if one of them has ended the job."""
        with contextlib.suppress(Exception):  # the store is gone: JAX ends this process itself
            if current is not None:
                record = {"phase": current.name, "number": current.number}
                peers.put("phase", json.dumps(record | {"seconds": now - current.since}))
            ended = peers.values("end")
            if ended:
                index = min(ended, key=lambda i: (not ended[i], i))
                where = _in_phase(current.name, now - current.since) if current else "in no phase"
                self._end(f"{ended[index]}; {self.name} was {where} and ends too", first=False)

    def _end(self, reason: str, first: bool = True) -> None:
        """Says why, shows the stacks, and ends this process; all others do the same."""
        report = threading.Thread(target=_report, args=[reason], daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        if self._peers is not None:
            with contextlib.suppress(Exception):
                _end_together(self._peers, reason if first else "")
        for child in multiprocessing.active_children():  # a stopped one would be left
            child.kill()
        os._exit(RESTART)

    def _who_is_behind(self, current: _Current) -> str:
        """The processes that this one waits for, or that it holds up the others itself."""
        if self._peers is None:
            return ""
        time.sleep(2 * _exchange_seconds(self._peers))  # until all have told where they are now
        records: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(Exception):
            records = {i: json.loads(text) for i, text in self._peers.values("phase").items()}
        others = {i: record for i, record in records.items() if i != self._peers.index}
        least = min((record["number"] for record in others.values()), default=current.number)
        behind = [i for i, record in sorted(others.items()) if record["number"] == least]
        if least > current.number:
            return "; all other processes wait for it"
        if least == current.number:
            return ""
        named = [
            f"process {i}, which has been {_in_phase(others[i]['phase'], others[i]['seconds'])}"
            for i in behind[:_NAMED_AT_MOST]
        ]
        more = len(behind) - len(named)
        return f"; it waits for {' and '.join(named)}{f' and {more} more' if more else ''}"


def _exchange_seconds(peers: Peers) -> float:
    """Seconds between two messages of a process, so that the store gets at most 400 a second."""
    return max(1.0, peers.count / 200)


def _end_together(peers: Peers, reason: str) -> None:
    """Returns when the other processes end too, or after a while.

    One that is gone makes the others fail inside a collective before they have said anything, and
    without process 0, which holds the store, they abort.
    """
    peers.put("end", reason)
    deadline = time.monotonic() + 10 + peers.count / 100
    while len(peers.values("end")) < peers.count and time.monotonic() < deadline:
        time.sleep(max(0.3, peers.count / 500))
    if peers.index == 0:
        time.sleep(1.0)


def _in_phase(name: str, seconds: float) -> str:
    return f"in the phase {name!r} ({DOING[name]}) for {seconds:.0f} s"


def _report(reason: str) -> None:
    """Everything past Python's buffers, whose locks the main thread may hold."""
    _write(f"{reason}. Exit code {RESTART}: start all processes again. Stacks of all threads:")
    faulthandler.dump_traceback(file=2)
    children = [f"{c.pid} ({c.name}, {_state(c.pid)})" for c in multiprocessing.active_children()]
    if children:
        _write(f"child processes, such as data workers: {', '.join(children)}")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _state(pid: int | None) -> str:
    """What a process of this machine does, as the kernel says it."""
    names = {"T": "stopped", "t": "traced", "R": "running", "S": "sleeping", "D": "waiting for I/O"}
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "state unknown"
    return names.get(letter, letter)


def _write(text: str) -> None:
    os.write(2, f"flax-transformers: {text}\n".encode(errors="replace"))


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    return read, write


watchdog = Watchdog()
"""That of this process."""

# A forked child is told to stop by its parent, and must not tell the parent so.
os.register_at_fork(after_in_child=watchdog.be_deaf)
