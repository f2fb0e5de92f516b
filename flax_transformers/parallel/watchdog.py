"""Watchdog thread of a process: ends a hanging job, with the reason and all stack traces.

The main thread declares its phase (``with watchdog.phase("data")``), and the watchdog compares the
time spent in it with ``Limits``. It works while the main thread is blocked in C++ or in a
collective, unless C code holds the interpreter lock. It receives SIGTERM and SIGINT at once, while
Python's handlers wait for the main thread.

In a job of several processes, watchdogs exchange their phases, so that each can name the process
that the others wait for, and all end together. This module does not import jax.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flax_transformers.parallel.limits import PHASES, Limits

RESTART = 75
"""Exit code after which all processes of the job must be restarted."""
TICK_SECONDS = 0.5
SUSPENDED_SECONDS = 5.0
"""A larger delay of a tick means that this process was suspended."""
_REPORT_SECONDS = 10.0  # time limit of the report: stderr may be a pipe that is not read
_DUMPED_PHASES = ("data", "step")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MAX_NAMED = 8


class Peers(Protocol):
    """Key-value store shared by all processes of the job."""

    index: int
    count: int

    def put(self, folder: str, value: str) -> None:
        """Set the value of this process in ``folder``."""

    def values(self, folder: str) -> dict[int, str]:
        """Values in ``folder`` by process index."""


@dataclass(frozen=True)
class _Current:
    """Phase of this process."""

    name: str
    since: float
    """Monotonic time of its start, or of the last progress."""
    number: int
    """Number of phases entered so far. It grows equally in all processes, so that the process with
    the lowest number is behind."""
    explain: Callable[[], str] | None = None


class Watchdog:
    """Phases of this process, and the thread that limits them once it is started."""

    def __init__(self) -> None:
        self.limits, self.dump_seconds = Limits(), 0.0
        self.name = "this process"
        self._peers: Peers | None = None
        self._checking = threading.Lock()
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
        """Start the thread; if it runs already, only set the limits.

        Stack traces of a step or a wait for data that takes longer than ``dump_seconds`` (0: never)
        are printed once to stderr.
        """
        self.limits, self.dump_seconds = limits, dump_seconds
        if self._thread is None:
            self._stopping, self._told = False, None
            self._pipes = {number: _pipe() for number in _SIGNALS}
            # Taken here: a process that is suspended before the thread runs is late, too.
            first = time.monotonic() + TICK_SECONDS
            self._thread = threading.Thread(
                target=self._watch, args=(first,), name="watchdog", daemon=True
            )
            self._thread.start()
            self.listen()

    def stop(self) -> None:
        """End the thread; phases are no longer limited."""
        if self._thread is not None:
            self.ignore_signals()
            self._stopping = True
            os.write(self._pipes[_SIGNALS[0]][1], b" ")  # wakes the thread
            self._thread.join()
            self._thread = self._told = None
            for pipe in self._pipes.values():
                for end in pipe:
                    os.close(end)

    @contextlib.contextmanager
    def running(self, limits: Limits, dump_seconds: float = 0.0) -> Iterator[None]:
        """Run the thread within this context; stop it afterwards if it did not run before."""
        ran = self.is_running
        self.start(limits, dump_seconds)
        try:
            yield
        finally:
            if not ran:
                self.stop()

    def join(self, peers: Peers) -> None:
        """Publish the phases of this process to the others from now on."""
        self.name = f"process {peers.index} of {peers.count}"
        self._peers = peers

    def leave(self) -> None:
        """Exchange nothing more: a thread that is in C++ when Python ends aborts its process."""
        with self._checking:
            self._peers = None

    @contextlib.contextmanager
    def phase(self, name: str, explain: Callable[[], str] | None = None) -> Iterator[None]:
        """Be in a phase of ``PHASES``; the time of the enclosing phase restarts afterwards.

        ``explain`` returns the reason that is reported when its limit is exceeded.
        """
        before = self._current
        self.enter(name, explain)
        try:
            yield
        except KeyboardInterrupt:
            self.acknowledge()  # the main thread has heard of it
            raise
        finally:
            if before is None:
                self._current = None
            else:
                self._enter(before.name, before.explain)

    def enter(self, name: str, explain: Callable[[], str] | None = None) -> None:
        """Enter a phase without leaving it."""
        assert name in PHASES
        self._enter(name, explain)

    def _enter(self, name: str, explain: Callable[[], str] | None) -> None:
        self._entered += 1
        self._current = _Current(name, time.monotonic(), self._entered, explain)

    def progress(self) -> None:
        """Restart the time of the current phase."""
        if self._current is not None:
            self._current = replace(self._current, since=time.monotonic())

    def acknowledge(self) -> None:
        """Clear the request to stop: the main thread saves now."""
        self._told = None

    def listen(self) -> None:
        """Receive SIGTERM and SIGINT, independent of the main thread; handlers are still called.

        Call this after handlers were installed, and ``ignore_signals`` before.
        """
        if self._thread is None or self._listening:
            return
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                # The only handler that works without the interpreter and also calls C++ handlers.
                # That it writes is the message; the stack traces in it are not read.
                faulthandler.register(
                    number, file=self._pipes[number][1], all_threads=False, chain=True
                )
        self._listening = True

    def ignore_signals(self) -> None:
        """Restore the handlers that were installed before ``listen``."""
        for number in _SIGNALS if self._listening else ():
            faulthandler.unregister(number)
        self._listening = False

    def _watch(self, expected: float) -> None:
        """Check limits at each tick; ``expected`` is the time of the first one."""
        next_exchange = 0.0
        while True:
            self._receive(TICK_SECONDS)
            if self._stopping:
                return
            now = time.monotonic()
            if now - expected > SUSPENDED_SECONDS:
                self._extend(now - expected)
            with self._checking:
                current, peers = self._current, self._peers
                if current is not None:
                    self._check(current, now)
                if peers is not None and now >= next_exchange:
                    self._exchange(peers, current, now)
                    next_exchange = now + _exchange_seconds(peers)
            expected = time.monotonic() + TICK_SECONDS

    def _receive(self, seconds: float) -> None:
        """Wait, and record a signal."""
        readers = {read: number for number, (read, _) in self._pipes.items()}
        with selectors.DefaultSelector() as selector:  # select.select knows files below 1024 only
            for read in readers:
                selector.register(read, selectors.EVENT_READ)
            ready = [key.fd for key, _ in selector.select(seconds)]
        for read in ready:
            with contextlib.suppress(BlockingIOError):
                while os.read(read, 65536):
                    pass
            number = signal.Signals(readers[read])
            # In no phase, as at the prompt of a notebook, an interrupt is for the program around.
            if self._told is None and (self._current is not None or number != signal.SIGINT):
                self._told = number.name, time.monotonic()

    def _extend(self, late: float) -> None:
        """Do not count time in which this process was suspended."""
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
                reason = f"{self.name} stopped waiting after {seconds:.0f} s: {current.explain()}"
            self._end(
                f"{reason}{self._who_is_behind(current)}; the limit is limits.{current.name}_s = "
                f"{limit:g}, which you can raise if the job was slow and not hanging"
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
        """Publish the phase of this process, and end it if another has ended the job."""
        with contextlib.suppress(Exception):  # without the store, JAX ends this process
            if current is not None:
                record = {"phase": current.name, "number": current.number}
                peers.put("phase", json.dumps(record | {"seconds": now - current.since}))
            ended = peers.values("end")
            if ended:
                index = min(ended, key=lambda i: (not ended[i], i))
                where = _in_phase(current.name, now - current.since) if current else "in no phase"
                self._end(f"{ended[index]}; {self.name} was {where} and ends too", first=False)

    def _end(self, reason: str, first: bool = True) -> None:
        """Report the reason and stack traces, and end all processes."""
        report = threading.Thread(target=_report, args=[reason], daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        if self._peers is not None:
            with contextlib.suppress(Exception):
                _end_together(self._peers, reason if first else "")
        for child in multiprocessing.active_children():  # also ends suspended ones
            child.kill()
        os._exit(RESTART)

    def _who_is_behind(self, current: _Current) -> str:
        """The processes that this one waits for, or that the others wait for this one."""
        if self._peers is None:
            return ""
        time.sleep(2 * _exchange_seconds(self._peers))  # until all have published their phases
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
            for i in behind[:_MAX_NAMED]
        ]
        more = len(behind) - len(named)
        return f"; it waits for {' and '.join(named)}{f' and {more} more' if more else ''}"


def _exchange_seconds(peers: Peers) -> float:
    """Interval of the messages of a process, for at most 400 requests to the store per second."""
    return max(1.0, peers.count / 200)


def _end_together(peers: Peers, reason: str) -> None:
    """Wait until the other processes end too, for a limited time.

    If this process ended first, the others would fail in a collective before they report, and
    without process 0, which holds the store, they would abort.
    """
    peers.put("end", reason)
    deadline = time.monotonic() + 10 + peers.count / 100
    while len(peers.values("end")) < peers.count and time.monotonic() < deadline:
        time.sleep(max(0.3, peers.count / 500))
    if peers.index == 0:
        time.sleep(1.0)


def _in_phase(name: str, seconds: float) -> str:
    return f"in the phase {name!r} ({PHASES[name]}) for {seconds:.0f} s"


def _report(reason: str) -> None:
    """Print the report without Python's buffers, whose locks the main thread may hold."""
    _write(f"{reason}. Exit code {RESTART}: restart all processes. Stacks of all threads:")
    faulthandler.dump_traceback(file=2)
    children = [f"{c.pid} ({c.name}, {_state(c.pid)})" for c in multiprocessing.active_children()]
    if children:
        _write(f"child processes, such as data workers: {', '.join(children)}")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _state(pid: int | None) -> str:
    """State of a process of this machine according to the kernel."""
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
"""The watchdog of this process."""

# A forked child shares the pipe: its signals must not be reported to the parent.
os.register_at_fork(after_in_child=watchdog.ignore_signals)
