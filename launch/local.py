"""Run one command in N supervised processes on this machine.

    python launch/local.py 2 -- train configs/bert_tiny.py --workdir runs/two

Each process runs ``python -m flax_transformers`` with the arguments after ``--``, and with the
environment variables that join the processes into one job. On a machine with GPUs, each of several
processes uses the GPU of its number: start one process for each GPU, or one for all of them. If a
process fails, the launcher ends the others and restarts all of them from the newest checkpoint, at
most ``--max-restarts`` times, after 1, 2, 4 ... 60 seconds. Exit codes are those of
``flax-transformers``: 0 done, 2 a user error (not restarted), 42 stopped on request after saving
(restarted with ``--requeue``, as often as it happens). The launcher forwards SIGTERM and Ctrl-C.

Requires Linux and, for several processes, prepared data (``flax-transformers prepare``). Uses only
Python's standard library.
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

DONE, USER_ERROR, PREEMPTED = 0, 2, 42
POLL_SECONDS = 0.1
LONGEST_PAUSE = 60.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_prctl = ctypes.CDLL(None).prctl  # looked up here, because little is safe between fork and exec


class Launcher:
    """The processes of one job, over all its attempts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self.asked_to_stop = False
        self._end_at_once = False

    def ask_to_stop(self, _number: int, _frame: object = None) -> None:
        """Signal handler: asks every process to save and end; a second signal ends them at once.

        Always sends SIGTERM, because jobs of several processes save on SIGTERM only.
        """
        self._end_at_once = self.asked_to_stop
        self.asked_to_stop = True
        self._signal_all(signal.SIGTERM)

    def attempt(self) -> list[int]:
        """Runs the job once, to the end of all its processes, and returns their exit codes."""
        port = _free_port()
        self._processes, self._readers = [], []
        try:
            for index in range(self._arguments.processes):
                self._processes.append(self._start(index, port))
            for index, process in enumerate(self._processes):
                reader = threading.Thread(target=self._read, args=(index, process), daemon=True)
                reader.start()
                self._readers.append(reader)
            if self.asked_to_stop:  # asked before all processes existed
                self._signal_all(signal.SIGTERM)
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
            environment.setdefault("JAX_LOCAL_DEVICE_IDS", str(index))  # no effect on CPUs and TPUs
        if self._arguments.devices:
            environment["JAX_NUM_CPU_DEVICES"] = str(self._arguments.devices)
        return subprocess.Popen(
            [sys.executable, "-m", "flax_transformers", *self._arguments.command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A process group per process: Ctrl-C reaches it through the launcher only, and its own
            # child processes are killed with it.
            start_new_session=True,
            preexec_fn=_end_with_launcher(os.getpid()),
        )

    def _wait(self) -> None:
        """Waits until all processes are done, one has failed, or the time to save is over.

        Processes that are left when the first one is done get the same time, because a process may
        hang.
        """
        deadline = None
        while any(code is None for code in self._codes()):
            failed = [
                f"process {index} by {_named(code)}"
                for index, code in enumerate(self._codes())
                if code is not None and code not in (DONE, PREEMPTED)
            ]
            if failed:
                _say(f"failed: {', '.join(failed)}")
                return
            one_is_done = any(code is not None for code in self._codes())
            if (self.asked_to_stop or one_is_done) and deadline is None:
                deadline = time.monotonic() + self._arguments.save_seconds
            if self._end_at_once or (deadline is not None and time.monotonic() > deadline):
                return
            time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        """Ends all processes: SIGTERM, then SIGKILL after the grace period, also to children."""
        self._signal_all(signal.SIGTERM)
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

    def _signal_all(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def _read(self, index: int, process: subprocess.Popen[str]) -> None:
        """Copies the output of one process to its log and to the terminal. Runs in a thread."""
        prefix = f"[{index}] " if self._arguments.processes > 1 else ""
        folder = self._arguments.logs
        with open(folder / f"process-{index}.log" if folder else os.devnull, "a") as log:
            assert process.stdout is not None
            for line in process.stdout:  # to the end: a full pipe would stop the process
                with contextlib.suppress(OSError):  # a full disk
                    log.write(line)
                    log.flush()
                with contextlib.suppress(OSError):  # nobody reads
                    print(prefix + line, end="", flush=True)


def main() -> int:
    arguments = _parse()
    launcher = Launcher(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, launcher.ask_to_stop)
    restarts = 0
    while True:
        codes = launcher.attempt()
        exit_code = _exit_code(codes, launcher.asked_to_stop)
        if launcher.asked_to_stop or exit_code in (DONE, USER_ERROR):
            return exit_code
        if exit_code == PREEMPTED and not arguments.requeue:
            return exit_code
        if exit_code == PREEMPTED:
            _say(f"exit codes {codes}; restart after a preemption")
            continue
        if restarts == arguments.max_restarts:
            _say(f"exit codes {codes}; gave up after {restarts} restart(s)")
            return exit_code
        pause = min(LONGEST_PAUSE, 2.0**restarts)
        restarts += 1
        _say(f"exit codes {codes}; restart {restarts} of {arguments.max_restarts} in {pause:.0f} s")
        wake = time.monotonic() + pause
        while time.monotonic() < wake and not launcher.asked_to_stop:
            time.sleep(POLL_SECONDS)
        if launcher.asked_to_stop:
            return PREEMPTED


def _exit_code(codes: list[int], asked_to_stop: bool) -> int:
    """One exit code for the job: user error, failure, preempted or done, in this order."""
    if asked_to_stop:  # a process that SIGTERM ended had nothing to save
        codes = [PREEMPTED if code == -signal.SIGTERM else code for code in codes]
    if USER_ERROR in codes:
        return USER_ERROR
    failures = [code for code in codes if code not in (DONE, PREEMPTED)]
    # Processes that the launcher ended with SIGTERM are not the cause of the failure.
    for code in [code for code in failures if code != -signal.SIGTERM] or failures:
        return code if code > 0 else 128 - code
    return max(codes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a flax-transformers command in N supervised processes on this machine.",
        usage="local.py N [options] -- COMMAND ...",
    )
    parser.add_argument("processes", type=int, metavar="N")
    parser.add_argument("--devices", type=int, help="number of virtual CPU devices per process")
    parser.add_argument("--max-restarts", type=int, default=10)
    parser.add_argument("--requeue", action="store_true", help="restart after exit code 42")
    parser.add_argument("--logs", type=Path, help="folder of process-<i>.log (appended)")
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=10,
        help="seconds from SIGTERM to SIGKILL",
    )
    parser.add_argument(
        "--save-seconds",
        type=float,
        default=600,
        help="seconds to save after SIGTERM, and to end after the first process is done",
    )
    own, command = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    if arguments.processes < 1 or not command:
        parser.error("give at least 1 process and, after --, a command such as train")
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    arguments.command = command
    return arguments


def _end_with_launcher(launcher: int):
    """A function to run between fork and exec: the process is killed when the launcher is."""

    def arrange() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # the launcher has already ended
            os._exit(1)

    return arrange


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _named(code: int) -> str:
    return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"


def _say(text: str) -> None:
    print(f"launch/local.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
