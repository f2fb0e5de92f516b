"""Jobs that hang: a table of kinds. All processes must end by themselves, with exit code 75.

A kind is as in ``damages``. The same command, without the hang, must then end in the state of the
run without faults.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from campaign import Campaign, fingerprint
from damages import Damage, Line, copy_of_run, run_to_its_end
from jobs import SAVE_EVERY, STEPS, Job

LIMIT_SECONDS = 3
PATIENCE_SECONDS = 120.0
"""For all to end. Most of it is the start of the processes."""


def loader(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """A process sleeps in data loading. The job is ended by its limit, by that of processes waiting
    for it in a step, or by a request to stop."""
    index = rng.randrange(processes)
    ways = ["data", "grace"] + ["step"] * (processes > 1)
    way = rng.choice(ways)
    hooks = {"CRASH_SLEEP": f"{index}:{rng.randrange(5, 11)}"}  # of 12 examples that are left
    options = {"limits.data-s": 600, "limits.step-s": 900, f"limits.{way}-s": LIMIT_SECONDS}
    named = "was told to stop" if way == "grace" else f"limits.{way}_s"
    with _shortened(campaign, processes) as workdir:
        job = Job(campaign.folder, workdir, processes, hooks, options)
        if way == "grace":
            _wait_for(job, "sleeps in data loading")
            _tell(job, rng.randrange(processes), signal.SIGTERM)
        found = _ended(job, [75] * processes, named)
        if processes > 1 and f"process {index} of {processes}" not in job.said():
            found.append("the process that sleeps is not named")
        found += _resumes(campaign, workdir, processes)
    return {"way": way, "victim": index, "exit_codes": job.codes(), "problems": found}


def worker(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """The data worker of a process is suspended."""
    options = {"limits.data-s": LIMIT_SECONDS, "data.workers": 1}
    with copy_of_run(campaign, processes) as workdir:
        shutil.rmtree(workdir / "checkpoints")  # a worker is several batches ahead
        job = Job(campaign.folder, workdir, processes, options=options)
        _wait_for(job, "\nstep ")
        stopped = _workers_of(job.processes[rng.randrange(processes)].pid)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        found = _ended(job, [75] * processes, "limits.data_s")
        time.sleep(1)
        if not stopped or any(map(_is_running, stopped)):
            found.append(f"workers {stopped} were not there, or were left")
        found += _resumes(campaign, workdir, processes)
    return {"exit_codes": job.codes(), "problems": found}


def absent(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """One of two processes never joins. (A single process waits for no other.)"""
    index = rng.randrange(2)
    workdir = campaign.folder / "absent"
    hooks = {"CRASH_ABSENT": str(index)}
    job = Job(campaign.folder, workdir, 2, hooks, {"limits.start-s": LIMIT_SECONDS})
    found = _ended(job, [0, 75] if index == 0 else [75, 0], "JAX_NUM_PROCESSES")
    return {"processes": 2, "victim": index, "exit_codes": job.codes(), "problems": found}


@contextlib.contextmanager
def _shortened(campaign: Campaign, processes: int) -> Any:
    """A copy of the run without faults, with a few steps left."""
    with copy_of_run(campaign, processes) as workdir:
        for back in range(2):
            step = STEPS[processes] - back * SAVE_EVERY[processes]
            shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
        yield workdir


def _wait_for(job: Job, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while text not in job.said() and time.monotonic() < deadline:
        time.sleep(0.1)


def _tell(job: Job, index: int, number: int) -> None:
    pid = job.processes[index].pid
    assert pid is not None
    os.kill(pid, number)


def _workers_of(pid: int | None) -> list[int]:
    """Spawned children of a process, by any of its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def _is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _ended(job: Job, codes: list[int], said: str) -> list[str]:
    """Waits for the end and returns the problems."""
    job.wait(PATIENCE_SECONDS)
    found = job.codes()
    job.kill()
    if found != codes:
        return [f"exit codes {found}, not {codes}: {job.said()[-400:]}"]
    problems = [] if said in job.said() else [f"{said!r} was not said"]
    if "most recent call first" not in job.said():
        problems.append("no stacks were shown")
    return problems


def _resumes(campaign: Campaign, workdir: Path, processes: int) -> list[str]:
    job = run_to_its_end(campaign, workdir, processes)
    if job.codes() != [0] * processes:
        return [f"exit codes {job.codes()} afterwards: {job.said()[-400:]}"]
    same = fingerprint(workdir)[0] == campaign.reference(processes)[0]
    return [] if same else ["states differ"]


HANGS = {"loader": Damage(12, loader), "worker": Damage(6, worker), "absent": Damage(4, absent)}
