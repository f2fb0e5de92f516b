"""N processes of one command on this machine, supervised as on a cluster.

    python launch/local.py 2 -- train configs/bert_tiny.py --workdir runs/two

Every process runs ``python -m flax_transformers`` with what stands behind ``--``, and the variables
that make them one job. If one of them fails, the others are ended and all start again, from the
newest checkpoint in the workdir: at most ``--max-restarts`` times, after 1, 2, 4 ... 60 seconds.
Exit codes are those of ``flax-transformers``: 0 done, 2 a mistake that a restart would not mend,
42 stopped on request after saving (``--requeue`` starts again). SIGTERM and Ctrl-C are passed on.

Assumes Linux and, for several processes, prepared data (``flax-transformers prepare``). Needs
nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

DONE, MISTAKE, PREEMPTED = 0, 2, 42
POLL_SECONDS = 0.1
LONGEST_PAUSE = 60.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_prctl = ctypes.CDLL(None).prctl  # looked up here: little may be done between fork and exec


class Launcher:
    """The processes of one job, from attempt to attempt."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self.asked_to_stop = False
        self._in_a_hurry = False

    def ask_to_stop(self, _number: int, _frame: object = None) -> None:
        """The launcher's own signal handler: every process saves and ends; at once if asked twice.

        Jobs of several processes save at SIGTERM alone, whichever signal the launcher got.
        """
        self._in_a_hurry = self.asked_to_stop
        self.asked_to_stop = True
        self._tell_all(signal.SIGTERM)

    def attempt(self) -> list[int]:
        """Runs the job once; the exit codes of its processes, none of which is left."""
        port = _free_port()
        self._processes, self._readers = [], []
        try:
            for index in range(self._arguments.processes):
                self._processes.append(self._start(index, port))
            for index, process in enumerate(self._processes):
                reader = threading.Thread(target=self._read, args=(index, process), daemon=True)
                reader.start()
                self._readers.append(reader)
            if self.asked_to_stop:  # before all were there to hear it
                self._tell_all(signal.SIGTERM)
            self._wait()
        finally:
            self._end_all()
        return [process.wait() for process in self._processes]

    def _start(self, index: int, port: int) -> subprocess.Popen[str]:
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if self._arguments.processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(self._arguments.processes),
                "JAX_PROCESS_ID": str(index),
            }
        if self._arguments.devices:
            environment["JAX_NUM_CPU_DEVICES"] = str(self._arguments.devices)
        return subprocess.Popen(
            [sys.executable, "-m", "flax_transformers", *self._arguments.command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A group of its own: Ctrl-C comes through the launcher, and what a process started
            # itself is ended with it.
            start_new_session=True,
            preexec_fn=_end_with_launcher(os.getpid()),
        )

    def _wait(self) -> None:
        """Until all processes are done, one has failed, or they were told to stop long ago.

        Those that are left when the first is done get the same time: a process may be stopped dead.
        """
        deadline = None
        while any(code is None for code in self._codes()):
            if any(code not in (None, DONE, PREEMPTED) for code in self._codes()):
                return
            one_is_done = any(code is not None for code in self._codes())
            if (self.asked_to_stop or one_is_done) and deadline is None:
                deadline = time.monotonic() + self._arguments.save_seconds
            if self._in_a_hurry or (deadline is not None and time.monotonic() > deadline):
                return
            time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        """TERM to what is left, KILL after the grace; then whatever these had started."""
        self._tell_all(signal.SIGTERM)
        deadline = time.monotonic() + self._arguments.grace_seconds
        while None in self._codes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for reader in self._readers:
            reader.join(timeout=5)

    def _tell_all(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def _read(self, index: int, process: subprocess.Popen[str]) -> None:
        """In a thread: what one process says, to its log and, with its number, to the terminal."""
        prefix = f"[{index}] " if self._arguments.processes > 1 else ""
        folder = self._arguments.logs
        with open(folder / f"process-{index}.log" if folder else os.devnull, "a") as log:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                print(prefix + line, end="", flush=True)


def main() -> int:
    arguments = _parse()
    launcher = Launcher(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, launcher.ask_to_stop)
    restarts = 0
    while True:
        codes = launcher.attempt()
        verdict = _verdict(codes, launcher.asked_to_stop)
        if launcher.asked_to_stop or verdict in (DONE, MISTAKE):
            return verdict
        if verdict == PREEMPTED and not arguments.requeue:
            return verdict
        if restarts == arguments.max_restarts:
            _say(f"exit codes {codes}; gave up after {restarts} restart(s)")
            return verdict
        pause = 0.0 if verdict == PREEMPTED else min(LONGEST_PAUSE, 2.0**restarts)
        restarts += 1
        _say(f"exit codes {codes}; restart {restarts} of {arguments.max_restarts} in {pause:.0f} s")
        wake = time.monotonic() + pause
        while time.monotonic() < wake and not launcher.asked_to_stop:
            time.sleep(POLL_SECONDS)
        if launcher.asked_to_stop:
            return PREEMPTED


def _verdict(codes: list[int], asked_to_stop: bool) -> int:
    """What the exit codes of a job say together: a mistake, a failure, preempted, or done."""
    if asked_to_stop:  # what the signal ended had nothing to save yet
        codes = [PREEMPTED if code == -signal.SIGTERM else code for code in codes]
    if MISTAKE in codes:
        return MISTAKE
    for code in codes:
        if code not in (DONE, PREEMPTED):
            return code if code > 0 else 128 - code
    return max(codes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a flax-transformers command in N supervised processes on this machine.",
        usage="local.py N [options] -- COMMAND ...",
    )
    parser.add_argument("processes", type=int, metavar="N")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process")
    parser.add_argument("--max-restarts", type=int, default=10)
    parser.add_argument("--requeue", action="store_true", help="start again after exit code 42")
    parser.add_argument("--logs", type=Path, help="folder for process-<i>.log, which are added to")
    parser.add_argument(
        "--grace-seconds", type=float, default=10, help="from TERM to KILL once one has failed"
    )
    parser.add_argument(
        "--save-seconds",
        type=float,
        default=600,
        help="for saving, once the launcher got TERM; also for ending, once one process is done",
    )
    own, command = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    if arguments.processes < 1 or not command:
        parser.error("give a number of processes from 1, and after -- a command such as train")
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    arguments.command = command
    return arguments


def _end_with_launcher(launcher: int):
    """For between fork and exec: a process that is killed when the launcher is."""

    def arrange() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it ended a moment ago
            os._exit(1)

    return arrange


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _say(text: str) -> None:
    print(f"launch/local.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
