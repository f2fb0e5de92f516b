"""A crash campaign: faults at random moments of tiny runs, each of which has to end bit-equal.

    python benchmarks/crash.py --folder /tmp/crash --log benchmarks/results/crash.jsonl

Runs of one and of two processes are killed, told to stop, stopped dead, robbed of their coordinator
and of room on the disk, some at random, some while a checkpoint is being written. After each fault
every process has to have ended by itself within 30 seconds, but for the one that was stopped and
for those that wait for a peer that never came: these a launcher ends.
The same command has to go on from the newest checkpoint that verifies. When a run is through, its
parameters, the state of its optimizer, its random key, and the example ids of every step have to be
those of a run without faults, bit for bit.
Bits of finished checkpoints are flipped too, and have to be noticed.

Everything follows from ``--seed``; each line of the log is one fault or one finished run, and the
same command goes on behind the last line. Processes are forked from one that has imported all, so
that a restart takes a second or two. A full disk needs root, for a tmpfs of 24 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY = {1: 400, 2: 60}, {1: 10, 2: 3}
"""By number of processes: two of them, on few cores, take longer for a step."""
COUNTS = {"kill": 100, "term": 20, "stop": 10, "disk": 5, "coordinator": 5, "flip": 500}
OF_TWO = ("stop", "coordinator")
"""Faults that one process alone cannot have."""
LONGEST_DELAY = {"start": 2.0, "train": 3.0, "save": 0.5}
PATIENCE_SECONDS = 30.0
"""For all to end after a fault."""
HEARTBEAT_SECONDS = 5
DISK_BYTES = 24 * 2**20


@dataclass(frozen=True)
class Fault:
    """What happens to a job of ``processes``: to ``victim``, ``delay`` seconds after ``moment``."""

    number: int
    kind: str
    processes: int
    moment: str
    """start: the command; train: a first step; save: a checkpoint begun."""
    delay: float
    victim: int


def plan(seed: int, counts: dict[str, int]) -> list[Fault]:
    """All faults but the flips, kinds mixed."""
    rng = random.Random(seed)
    kinds = [kind for kind, count in counts.items() if kind != "flip" for _ in range(count)]
    rng.shuffle(kinds)
    faults, seen = [], dict.fromkeys(counts, 0)
    for number, kind in enumerate(kinds):
        seen[kind] += 1
        processes = 2 if kind in OF_TWO else 1 + seen[kind] % 2
        moment = rng.choice(("start", "train", "train", "save", "save"))
        if kind == "stop":  # before the first step there is nobody to notice
            moment = "train"
        if kind == "disk":  # which is noticed when there is something to write
            moment = "save"
        delay = rng.uniform(0, LONGEST_DELAY[moment])
        victim = 0 if kind == "coordinator" else rng.randrange(processes)
        faults.append(Fault(number, kind, processes, moment, delay, victim))
    return faults


class Job:
    """The processes of one attempt of the training command."""

    def __init__(self, folder: Path, workdir: Path, processes: int) -> None:
        self.log = folder / "attempt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for index in range(processes):
            environment = {"FLAX_TRANSFORMERS_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS)}
            if processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index),
                }
            self.processes.append(
                multiprocessing.Process(
                    target=run_command,
                    args=(
                        training(folder, workdir, processes),
                        environment,
                        f"{self.log}-{index}.txt",
                    ),
                )
            )
            Path(f"{self.log}-{index}.txt").write_text("")
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float, besides: int | None = None) -> float:
        """Until all have ended, but for the process ``besides``; how many seconds that took."""
        start = time.monotonic()
        for index, process in enumerate(self.processes):
            if index != besides:
                process.join(max(0.0, start + seconds - time.monotonic()))
        return time.monotonic() - start

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()

    def said(self) -> str:
        return "".join(
            Path(f"{self.log}-{index}.txt").read_text(errors="replace")
            for index in range(len(self.processes))
        )

    def resumed_from(self) -> int | None:
        found = re.search(r"resuming from step (\d+)", self.said())
        return int(found.group(1)) if found else None


def training(folder: Path, workdir: Path, processes: int) -> list[str]:
    """The command: a model as small as they come, on text made up for it."""
    return ["train", *settings(folder, processes), "--workdir", str(workdir)]


def prepare(folder: Path) -> None:
    """Tokenises the text, which a job of several processes wants to find done."""
    log = folder / "prepare.txt"
    process = multiprocessing.Process(
        target=run_command, args=(["prepare", *settings(folder, 1)], {}, str(log))
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the text could not be prepared: {log.read_text()}")


def settings(folder: Path, processes: int) -> list[str]:
    """A config and what is changed of it."""
    changes = {
        "data.source.path": folder / "text.txt",
        "data.store": folder / "store",
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.lowercase": False,
        "data.validation-fraction": 0.1,
        "model.vocab-size": 262,
        "model.hidden-size": 16,
        "model.num-heads": 2,
        "model.num-layers": 1,
        "model.intermediate-size": 16,
        "model.dropout": 0.1,
        "phases.0.steps": STEPS[processes],
        "phases.0.sequence-length": 16,
        "phases.0.batch-size": 4,
        "evaluation.batch-size": 16,
        "evaluation.max-examples": 16,
        "evaluation.every-steps": 0,
        "checkpoints.every-steps": SAVE_EVERY[processes],
        "logging.ledger": True,
        "logging.tensorboard": False,
    }
    flags = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return [str(ROOT / "configs" / "bert_tiny.py"), *flags]


def run_command(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In a forked process: what ``python -m flax_transformers`` does, from start to exit code."""
    import atexit

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    from flax_transformers.cli.main import main

    try:
        code = main(arguments)
        atexit._run_exitfuncs()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    os._exit(code)


def strike(fault: Fault, job: Job, workdir: Path) -> bool:
    """Waits for the moment of the fault and lets it happen; False if the job ended before."""

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
    if fault.kind == "disk":
        _fill_disk(workdir, room=random.Random(fault.number).randrange(0, 200_000))
    else:
        numbers = {"term": signal.SIGTERM, "stop": signal.SIGSTOP}
        pid = job.processes[fault.victim].pid
        assert pid is not None
        os.kill(pid, numbers.get(fault.kind, signal.SIGKILL))
    return True


def _fill_disk(workdir: Path, room: int) -> None:
    free = shutil.disk_usage(workdir).free
    with (
        contextlib.suppress(OSError),  # the run has filled the rest meanwhile
        open(workdir.parent / "filler", "wb") as filler,
    ):
        filler.write(b"\0" * max(0, free - room))


def newest_valid(workdir: Path) -> int | None:
    from flax_transformers.errors import UserError
    from flax_transformers.training.checkpoints import find_checkpoint

    try:
        return find_checkpoint(workdir).step
    except UserError:
        return None


def fingerprint(workdir: Path) -> tuple[str, str]:
    """Hashes of the final state, and of the example ids of every step."""
    import jax

    from flax_transformers.training.checkpoints import restore_arrays

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(restore_arrays(workdir)):
        digest.update(jax.tree_util.keystr(path).encode() + leaf.tobytes())
    ledgers = hashlib.sha256()
    for file in sorted(workdir.glob("ledger-*.jsonl")):
        ledgers.update(file.read_bytes())
    return digest.hexdigest(), ledgers.hexdigest()


def problems_with(fault: Fault, job: Job, expected: int | None) -> list[str]:
    """What went otherwise than it should have, once everyone had 30 seconds to end."""
    codes, said, found = job.codes(), job.said(), []
    others = [code for index, code in enumerate(codes) if index != fault.victim]
    if fault.kind == "term":
        # Before the loop there is nothing to save, and SIGTERM simply ends the process.
        early = -signal.SIGTERM if fault.moment == "start" else 42
        through = f"step {STEPS[fault.processes]}/" in said  # it had no step left to stop at
        if codes[fault.victim] not in (42, early, *((0,) if through else ())):
            found.append("the process told to stop did not end with 42")
    elif fault.kind == "disk":
        through = set(codes) == {0}  # what was left to write found room
        if not through and (2 not in codes or not re.search("(could not|cannot) be written", said)):
            found.append("a full disk was not told in a sentence")
        if "Traceback" in said and fault.processes == 1:
            found.append("a full disk left a traceback")
    elif fault.moment != "start" and not set(others) <= {75, -signal.SIGABRT}:
        found.append("a survivor ended neither with 75 nor by abort")
    if None in (others if fault.kind == "stop" else codes):
        found.append("a process was left")
    resumed = job.resumed_from()
    if resumed is not None and resumed != expected:
        found.append(f"went on from step {resumed}, not {expected}")
    if resumed is None and expected is not None and fault.moment != "start":
        found.append(f"began anew, not from step {expected}")
    return found


def next_fault(fault: Fault, folder: Path, workdir: Path) -> dict[str, Any] | None:
    """One attempt of the run and the fault in it; None if the run was through before it."""
    expected = newest_valid(workdir)
    job = Job(folder, workdir, fault.processes)
    try:
        struck = strike(fault, job, workdir)
        if not struck:
            job.wait(PATIENCE_SECONDS)
            return None
        if fault.processes > 1 and fault.moment == "start" and fault.kind != "term":
            job.kill()  # as launchers do: they may still wait, for minutes, for one that never came
        besides = fault.victim if fault.kind == "stop" else None
        seconds = job.wait(PATIENCE_SECONDS, besides)
        found = problems_with(fault, job, expected)
        codes = job.codes()
    finally:
        job.kill()
        (workdir.parent / "filler").unlink(missing_ok=True)
    if found:
        shutil.copytree(workdir, folder / f"failed-{fault.number}", dirs_exist_ok=True)
        (folder / f"failed-{fault.number}.txt").write_text(job.said())
    return asdict(fault) | {
        "exit_codes": codes,
        "seconds_to_end": round(seconds, 2),
        "went_on_from": job.resumed_from(),
        "newest_valid": newest_valid(workdir),
        "problems": found,
    }


def finish(folder: Path, workdir: Path, processes: int) -> list[str]:
    """Runs the command to its end; what is wrong with it."""
    job = Job(folder, workdir, processes)
    job.wait(300)
    codes = job.codes()
    job.kill()
    return [] if codes == [0] * processes else [f"exit codes {codes}: {job.said()[-400:]}"]


class Campaign:
    """Its folder and its log."""

    def __init__(self, folder: Path, log: Path, deadline: float) -> None:
        self.folder, self.log, self.deadline = folder, log, deadline
        self.lines: list[dict[str, Any]] = []
        if log.exists():
            self.lines = [json.loads(line) for line in log.read_text().splitlines()]
        commits = [line["commit"] for line in self.lines if "commit" in line]
        if commits[-1:] != [_commit()]:
            self.write({"commit": _commit(), "cores": len(os.sched_getaffinity(0)), "problems": []})
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True, exist_ok=True)
        size = ["-o", f"size={DISK_BYTES}"]
        if not os.path.ismount(self.disk):
            done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", self.disk], check=False)
            self.small = done.returncode == 0
        else:
            self.small = True

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def reference(self, processes: int) -> tuple[str, str]:
        workdir = self.folder / f"reference-{processes}"
        if newest_valid(workdir) != STEPS[processes]:
            problems = finish(self.folder, workdir, processes)
            if problems:
                raise SystemExit(f"the run without faults failed: {problems[0]}")
        return fingerprint(workdir)

    def strike_all(self, faults: list[Fault], processes: int) -> None:
        """Faults one after the other; a run that is through is compared, and the next begun."""
        expected = self.reference(processes)
        workdir = self.disk / f"run-{processes}"
        struck = 0
        for fault in faults:
            line = None
            while line is None and time.monotonic() < self.deadline:
                line = next_fault(fault, self.folder, workdir)
                if line is None:
                    self.compare(workdir, processes, expected, struck)
                    struck = 0
            if line is None:
                break
            struck += 1
            self.write(line)
        if workdir.exists():
            self.compare(workdir, processes, expected, struck)

    def compare(
        self, workdir: Path, processes: int, expected: tuple[str, str], faults: int
    ) -> None:
        problems = finish(self.folder, workdir, processes)  # which is quick where it is through
        if not problems:
            found = fingerprint(workdir)
            names = ("states", "example ids")
            problems = [
                f"{name} differ"
                for name, a, b in zip(names, found, expected, strict=True)
                if a != b
            ]
        self.write({"run": processes, "faults": faults, "problems": problems})
        if problems:
            shutil.copytree(workdir, self.folder / f"failed-run-{len(self.lines)}")
        shutil.rmtree(workdir)

    def flip(self, number: int, seed: int, layouts: list[int]) -> None:
        """One bit of the newest checkpoint of a reference; it must be named, and passed over."""
        from flax_transformers.training.checkpoints import verify_step

        rng = random.Random(f"{seed} {number}")
        processes = layouts[number % len(layouts)]
        workdir = self.folder / f"reference-{processes}"
        newest = workdir / "checkpoints" / str(STEPS[processes])
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        path = rng.choice(files)
        original = path.read_bytes()
        place, bit = rng.randrange(len(original)), rng.randrange(8)
        damaged = bytearray(original)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            said, other = verify_step(newest), newest_valid(workdir)
        finally:
            path.write_bytes(original)
        problems = [] if said and other == STEPS[processes] - SAVE_EVERY[processes] else ["missed"]
        where = {
            "processes": processes,
            "file": str(path.relative_to(newest)),
            "byte": place,
            "bit": bit,
        }
        self.write({"number": number, "kind": "flip", **where, "said": said, "problems": problems})


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def summary(lines: list[dict[str, Any]]) -> str:
    """A table of what was done and how it ended."""
    text = [
        "| fault | processes | times | longest until all had ended | problems |",
        "|---" * 5 + "|",
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        if "commit" not in line:
            kind = line.get("kind", "run to the end, compared")
            groups.setdefault((kind, line.get("processes", line.get("run"))), []).append(line)
    for (kind, processes), group in sorted(groups.items()):
        seconds = [line["seconds_to_end"] for line in group if "seconds_to_end" in line]
        longest = f"{max(seconds):.1f} s" if seconds else ""
        bad = sum(bool(line["problems"]) for line in group)
        text.append(f"| {kind} | {processes} | {len(group)} | {longest} | {bad} |")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults at random moments of tiny runs.")
    parser.add_argument("--folder", type=Path, required=True, help="for runs; some 50 MB")
    parser.add_argument("--log", type=Path, required=True, help="a line per fault; added to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no fault after so long")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], choices=[1, 2])
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="TIMES")
    arguments = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(PRELOAD)

    from flax_transformers.testing import write_corpus

    write_corpus(folder / "text.txt", documents=60)
    campaign = Campaign(folder, arguments.log, time.monotonic() + 60 * arguments.minutes)
    done = {(line.get("kind"), line.get("number")) for line in campaign.lines}
    counts = {kind: getattr(arguments, kind) for kind in COUNTS}
    faults = [
        fault for fault in plan(arguments.seed, counts) if campaign.small or fault.kind != "disk"
    ]
    if not campaign.small:
        print("no full disks: a tmpfs cannot be mounted here", file=sys.stderr)
    prepare(folder)
    for processes in arguments.processes:
        left = [f for f in faults if f.processes == processes and (f.kind, f.number) not in done]
        campaign.strike_all(left, processes)
    for number in range(counts["flip"]):
        if ("flip", number) not in done:
            campaign.flip(number, arguments.seed, arguments.processes)
    print(summary(campaign.lines))
    return int(any(line["problems"] for line in campaign.lines))


PRELOAD = [
    f"flax_transformers.{name}"
    for name in ("cli.train", "cli.runtime", "cli.report", "cli.scores", "cli.config_file",
                 "training.loop", "families.bert", "training.plots")
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
