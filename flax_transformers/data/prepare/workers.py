"""Runs a function for runs of shards, in this process or in several, and shows progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from flax_transformers.data.pipeline.processes import end_with_parent
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog

_THREADS = "TOKENIZERS_PARALLELISM"
Work = Callable[[Sequence[int], "Note"], None]  # processes a run of shards in order; picklable


class Note(Protocol):
    """Reports progress; may raise to stop the work."""

    def __call__(self, documents: int = 0, tokens: int = 0, shards: int = 0) -> None:
        """Adds the progress since the last call."""


def require_job(job: int, jobs: int, shards: int) -> None:
    """Raises UserError for a job that does not exist or has no shard."""
    if not 0 <= job < jobs <= shards:
        raise UserError(
            f"Shard {job}/{jobs} does not exist: jobs are numbered from 0, and there are "
            f"data.shards, {shards}, for them."
        )


def for_each_run(
    work: Work,
    runs: Sequence[Sequence[int]],
    processes: int,
    *,
    done: str,
    total: int,
    unit: str = "documents",
) -> None:
    """Calls ``work`` for each run of the missing ones of ``total`` shards; each process uses one
    core.

    ``done``: what is done with a shard ("tokenized"); ``unit``: what it contains. Raises what
    ``work`` raises.
    """
    with _Reporter(done, total, total - sum(map(len, runs)), unit) as reporter:
        if processes > 1 and len(runs) > 1:
            _in_processes(work, runs, processes, reporter)
            return
        with _one_core() if processes == 1 else contextlib.nullcontext():
            for run in runs:
                work(run, reporter.note)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Limits the tokenizers library, which reads this variable on every call, to one core."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[_THREADS]
        if before is not None:
            os.environ[_THREADS] = before


@dataclass(frozen=True)
class _Job:
    """What a worker process needs."""

    work: Work
    progress: Any  # shared array of int64: documents, tokens, shards
    stop: Any  # shared event


_job: _Job | None = None


class _Stopped(Exception):
    """Another process failed; this one stops."""


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us
    os.environ[_THREADS] = "false"  # one core each


def _run_in_worker(run: Sequence[int]) -> None:
    job = _job
    assert job is not None

    def note(documents: int = 0, tokens: int = 0, shards: int = 0) -> None:
        if job.stop.is_set():
            raise _Stopped
        with job.progress.get_lock():
            job.progress[0] += documents
            job.progress[1] += tokens
            job.progress[2] += shards

    job.work(run, note)


def _in_processes(
    work: Work, runs: Sequence[Sequence[int]], processes: int, reporter: _Reporter
) -> None:
    context = multiprocessing.get_context("spawn")
    try:
        job = _Job(work, context.Array("q", 3), context.Event())
    except OSError as error:  # such as without /dev/shm
        raise UserError(
            f"Processes that prepare need shared memory, which this machine refuses ({error}); "
            "mount /dev/shm, or set data.prepare_processes to 1."
        ) from error
    pool = ProcessPoolExecutor(min(processes, len(runs)), context, _start_worker, (job,))
    try:
        waiting: set[Future[None]] = {pool.submit(_run_in_worker, run) for run in runs}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            reporter.set(*job.progress[:])
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A process that prepares died, perhaps out of memory; run the same command again to "
            "resume, with fewer prepare_processes. (A script that prepares needs "
            '`if __name__ == "__main__"`.)'
        ) from error
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)


class _Reporter:
    """A progress bar if stderr is a terminal, else a line for every finished shard."""

    def __init__(self, what: str, shards: int, done: int, unit: str) -> None:
        self._unit = unit
        self._what, self._shards, self._done, self._missing = what, shards, done, shards - done
        self._documents = self._tokens = self._new = 0
        # Imported here, as configs import this module and need no progress bar.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._lines = not console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} shards  {task.fields[counts]}"),
            TimeElapsedColumn(),
            console=console,
            disable=self._lines,
        )
        self._task = self._bar.add_task("", total=shards, completed=done, counts="")

    def __enter__(self) -> _Reporter:
        if self._missing:
            self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._bar.stop()

    def note(self, documents: int = 0, tokens: int = 0, shards: int = 0) -> None:
        self.set(self._documents + documents, self._tokens + tokens, self._new + shards)

    def set(self, documents: int, tokens: int, new: int) -> None:
        """Sets the total numbers of documents, tokens and shards."""
        if (documents, tokens, new) != (self._documents, self._tokens, self._new):
            watchdog.progress()
        self._documents, self._tokens = documents, tokens
        self._bar.update(self._task, counts=self._counts())
        while self._new < new:
            self._new += 1
            done = self._done + self._new
            self._bar.update(self._task, completed=done)
            if self._lines:
                line = f"{self._what} shard {done} of {self._shards}: {self._counts()}"
                print(line, file=sys.stderr, flush=True)

    def _counts(self) -> str:
        tokens = f", {self._tokens:,} tokens" if self._tokens else ""
        return f"{self._documents:,} {self._unit}{tokens}"
