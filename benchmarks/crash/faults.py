"""Faults of a running job: a table of kinds, their moments and the required outcome."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs import STEPS, Job

LONGEST_DELAY = {"start": 2.0, "train": 3.0, "save": 0.5}
MOMENTS = ("start", "train", "train", "save", "save")


@dataclass(frozen=True)
class Kind:
    """A kind of fault. To add one, add a line to KINDS."""

    count: int
    strike: Callable[[Fault, Job, Path], None]
    problems: Callable[[Fault, Job], list[str]]
    """What ended otherwise than it should have, once all had time to end."""
    moments: tuple[str, ...] = MOMENTS
    of_two: bool = False
    """Whether one process alone cannot have it."""


@dataclass(frozen=True)
class Fault:
    """A fault of ``victim`` in a job of ``processes``, ``delay`` seconds after ``moment``."""

    number: int
    kind: str
    processes: int
    moment: str
    """start: the command; train: a first step; save: a checkpoint begun."""
    delay: float
    victim: int


def plan(seed: int, counts: dict[str, int]) -> list[Fault]:
    """All faults, kinds mixed."""
    rng = random.Random(seed)
    names = [name for name in KINDS for _ in range(counts[name])]
    rng.shuffle(names)
    faults, seen = [], dict.fromkeys(KINDS, 0)
    for number, name in enumerate(names):
        kind = KINDS[name]
        seen[name] += 1
        processes = 2 if kind.of_two else 1 + seen[name] % 2
        moment = rng.choice(kind.moments)
        delay = rng.uniform(0, LONGEST_DELAY[moment])
        victim = 0 if name == "coordinator" else rng.randrange(processes)
        faults.append(Fault(number, name, processes, moment, delay, victim))
    return faults


def strike(fault: Fault, job: Job, workdir: Path) -> bool:
    """Waits for the moment of the fault and causes it; False if the job ended before."""

    def waited(condition: Callable[[], bool]) -> bool:
        while not condition():
            if any(code is not None for code in job.codes()):
                return False
            time.sleep(0.01)
        return True

    def stepped() -> bool:
        return re.search(r"^step +\d+/", job.said(), re.MULTILINE) is not None

    if fault.moment != "start" and not waited(stepped):
        return False
    saving = workdir / "checkpoints"
    if fault.moment == "save" and not waited(lambda: any(saving.glob("*checkpoint-tmp"))):
        return False
    time.sleep(fault.delay)
    if any(code is not None for code in job.codes()):
        return False
    KINDS[fault.kind].strike(fault, job, workdir)
    return True


def _signal(number: int) -> Callable[[Fault, Job, Path], None]:
    def send(fault: Fault, job: Job, workdir: Path) -> None:
        pid = job.processes[fault.victim].pid
        assert pid is not None
        os.kill(pid, number)

    return send


def _fill_disk(fault: Fault, job: Job, workdir: Path) -> None:
    space = random.Random(fault.number).randrange(0, 200_000)
    free = shutil.disk_usage(workdir).free
    with (
        contextlib.suppress(OSError),  # the run has filled the rest in the meantime
        open(workdir.parent / "filler", "wb") as filler,
    ):
        filler.write(b"\0" * max(0, free - space))


def _not_stopped_well(fault: Fault, job: Job) -> list[str]:
    # Before the loop there is nothing to save, and SIGTERM ends the process.
    early = -signal.SIGTERM if fault.moment == "start" else 42
    # A completed job has saved its last step, and has none left at which to stop.
    through = f"step {STEPS[fault.processes]}/" in job.said()
    allowed = (42, early, *((0, -signal.SIGTERM) if through else ()))
    if job.codes()[fault.victim] in allowed:
        return []
    return ["the process told to stop did not end with 42"]


def _disk_not_told(fault: Fault, job: Job) -> list[str]:
    codes, said, found = job.codes(), job.said(), []
    through = set(codes) == {0}  # the rest fitted on the disk
    if not through and (2 not in codes or not re.search("(could not|cannot) be written", said)):
        found.append("a full disk was not told in a sentence")
    if "Traceback" in said and fault.processes == 1:
        found.append("a full disk left a traceback")
    return found


def _survivor_not_ended(fault: Fault, job: Job) -> list[str]:
    others = [code for index, code in enumerate(job.codes()) if index != fault.victim]
    if fault.moment != "start" and not set(others) <= {75, -signal.SIGABRT}:
        return ["a survivor ended neither with 75 nor by abort"]
    return []


KINDS = {
    "kill": Kind(100, _signal(signal.SIGKILL), _survivor_not_ended),
    "term": Kind(20, _signal(signal.SIGTERM), _not_stopped_well),
    # Before the first step no process detects it.
    "stop": Kind(10, _signal(signal.SIGSTOP), _survivor_not_ended, ("train",), of_two=True),
    # It is detected at the next write.
    "disk": Kind(5, _fill_disk, _disk_not_told, ("save",)),
    "coordinator": Kind(5, _signal(signal.SIGKILL), _survivor_not_ended, of_two=True),
}


def problems_with(fault: Fault, job: Job, expected: int | None) -> list[str]:
    """The differences from the required outcome, after all had time to end."""
    codes = job.codes()
    others = [code for index, code in enumerate(codes) if index != fault.victim]
    found = KINDS[fault.kind].problems(fault, job)
    if None in (others if fault.kind == "stop" else codes):
        found.append("a process was left")
    resumed = job.resumed_from()
    if resumed is not None and resumed != expected:
        found.append(f"resumed from step {resumed}, not {expected}")
    if resumed is None and expected is not None and fault.moment != "start":
        found.append(f"began from the start, not from step {expected}")
    return found
