"""The folder and the log of a campaign, and its sequence of faults."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults import Fault, problems_with, strike
from jobs import PATIENCE_SECONDS, ROOT, STEPS, Job

DISK_BYTES = 24 * 2**20


def newest_valid(workdir: Path) -> int | None:
    from flax_transformers.checkpointing.manager import find_checkpoint
    from flax_transformers.errors import UserError

    try:
        return find_checkpoint(workdir).step
    except UserError:
        return None


def fingerprint(workdir: Path) -> tuple[str, str]:
    """Hashes of the final state, and of the example ids of every step."""
    import jax

    from flax_transformers.checkpointing.manager import restore_arrays

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(restore_arrays(workdir)):
        digest.update(jax.tree_util.keystr(path).encode() + leaf.tobytes())
    examples = hashlib.sha256()
    for file in sorted(workdir.glob("ledger-*.jsonl")):
        examples.update(file.read_bytes())
    return digest.hexdigest(), examples.hexdigest()


def next_fault(fault: Fault, folder: Path, workdir: Path) -> dict[str, Any] | None:
    """One attempt of the run with a fault; None if the run completed before the fault."""
    expected = newest_valid(workdir)
    job = Job(folder, workdir, fault.processes)
    try:
        struck = strike(fault, job, workdir)
        if not struck:
            job.wait(PATIENCE_SECONDS)
            return None
        if fault.processes > 1 and fault.moment == "start" and job.died(fault.victim):
            job.kill()  # as launchers do: it may wait for minutes for a peer that never joined
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
    """Runs the command to its end and returns the problems."""
    job = Job(folder, workdir, processes)
    job.wait(300)
    codes = job.codes()
    job.kill()
    return [] if codes == [0] * processes else [f"exit codes {codes}: {job.said()[-400:]}"]


class Campaign:
    """The folder and the log of a campaign."""

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
        problems = finish(self.folder, workdir, processes)  # quick if the run is complete
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


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def summary(lines: list[dict[str, Any]]) -> str:
    """A table of faults and their outcomes."""
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
