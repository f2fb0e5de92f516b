"""Damage to the files of a completed run: a table of kinds.

A kind is a function of the campaign, a generator and the number of processes, which returns what it
did and the problems. To add one, add a line to DAMAGES.
"""

from __future__ import annotations

import contextlib
import errno
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign import Campaign, fingerprint, newest_valid
from jobs import SAVE_EVERY, STEPS, Job

Line = dict[str, Any]


@dataclass(frozen=True)
class Damage:
    count: int
    do: Callable[[Campaign, random.Random, int], Line]


@contextlib.contextmanager
def copy_of_run(campaign: Campaign, processes: int) -> Iterator[Path]:
    """A copy of the run without faults."""
    workdir = campaign.folder / f"copy-{processes}"
    shutil.rmtree(workdir, ignore_errors=True)
    campaign.reference(processes)
    shutil.copytree(campaign.folder / f"reference-{processes}", workdir, symlinks=True)
    yield workdir
    shutil.rmtree(workdir)


def run_to_its_end(campaign: Campaign, workdir: Path, processes: int, **how: Any) -> Job:
    """Runs the command in a workdir, for at most two minutes."""
    job = Job(campaign.folder, workdir, processes, **how)
    try:
        job.wait(120)
        job.ended = job.codes()
    finally:
        job.kill()
    return job


def _flip_bit(path: Path, rng: random.Random) -> Line:
    raw = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(raw)), rng.randrange(8)
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    return {"byte": place, "bit": bit}


def flip(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """Flips a bit of the newest checkpoint, which must be named and not used."""
    from etils import epath

    from flax_transformers.storage import checksums

    workdir = campaign.folder / f"reference-{processes}"
    campaign.reference(processes)
    newest = workdir / "checkpoints" / str(STEPS[processes])
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    original = path.read_bytes()
    try:
        where = _flip_bit(path, rng)
        said, other = checksums.verify(epath.Path(newest)), newest_valid(workdir)
    finally:
        path.write_bytes(original)
    passed = said and other == STEPS[processes] - SAVE_EVERY[processes]
    file = str(path.relative_to(newest))
    return {"file": file, **where, "said": said, "problems": [] if passed else ["missed"]}


def side(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """A side file has a flipped bit, is truncated, removed, a folder or unreadable. The run,
    without its last checkpoint, must end in the same state."""
    ways: dict[str, Callable[[Path], Any]] = {
        "flip": lambda path: _flip_bit(path, rng),
        "cut": lambda path: path.write_bytes(path.read_bytes()[: rng.randrange(99)]),
        "remove": lambda path: path.unlink(),
        "folder": lambda path: (path.unlink(), path.mkdir(), (path / "stray").touch()),
        "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    }
    with copy_of_run(campaign, processes) as workdir:
        shutil.rmtree(workdir / "checkpoints" / str(STEPS[processes]))
        files = [path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size]
        files = [p for p in files if "checkpoints" not in p.relative_to(workdir).parts]
        path, way = rng.choice(sorted(files)), rng.choice(sorted(ways))
        ways[way](path)
        job = run_to_its_end(campaign, workdir, processes)
        problems = []
        if job.codes() != [0] * processes:
            problems = [f"exit codes {job.codes()}: {job.said()[-400:]}"]
        elif fingerprint(workdir)[0] != campaign.reference(processes)[0]:
            problems = ["states differ"]
        return {"file": str(path.relative_to(workdir)), "way": way, "problems": problems}


def unreadable(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """The newest checkpoint temporarily cannot be read: an error that changes nothing."""
    number = rng.choice([errno.EACCES, errno.EIO, errno.ESTALE])
    with copy_of_run(campaign, processes) as workdir:
        before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        value = f"{number}:checkpoints/{STEPS[processes]}/"
        job = run_to_its_end(campaign, workdir, processes, hooks={"CRASH_UNREADABLE": value})
        problems = []
        if 2 not in job.codes() or "cannot be read" not in job.said():
            problems.append(f"not told: exit codes {job.codes()}: {job.said()[-400:]}")
        if sorted(path.name for path in (workdir / "checkpoints").iterdir()) != before:
            problems.append("checkpoints were changed")
        again = run_to_its_end(campaign, workdir, processes)
        if again.codes() != [0] * processes or fingerprint(workdir) != campaign.reference(
            processes
        ):
            problems.append(f"not well afterwards: {again.said()[-400:]}")
        return {"errno": number, "problems": problems}


def nan(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """A sequence of NaN batches: some may be skipped, and one rollback is allowed."""
    limit, rollbacks, steps = 5, rng.randrange(2), STEPS[processes]
    first, length = rng.randrange(1, steps - 10), rng.choice([1, 4, 5, 6, 9, 2 * limit])
    options = {"max-consecutive-skips": limit, "max-rollbacks": rollbacks}
    workdir = campaign.folder / f"nan-{processes}"
    shutil.rmtree(workdir, ignore_errors=True)
    hooks = {"CRASH_NAN": f"{first}:{first + length}"}
    job = run_to_its_end(campaign, workdir, processes, hooks=hooks, options=options)
    problems = _spoilt(workdir)
    newest = newest_valid(workdir)
    # A rollback skips the rest of the sequence, except a last step that may be running.
    may_end = length <= limit or (rollbacks and newest_before(first, processes) > 0)
    if may_end and (job.codes() != [0] * processes or newest != steps):
        problems.append(f"exit codes {job.codes()} at {newest}: {job.said()[-400:]}")
    if not may_end and (2 not in job.codes() or (newest or 0) > first):
        problems.append(f"exit codes {job.codes()}, newest {newest}: {job.said()[-400:]}")
    shutil.rmtree(workdir)
    return {
        "first": first, "length": length, "rollbacks": rollbacks, "exit_codes": job.codes(),
        "newest": newest, "problems": problems,
    }  # fmt: skip


def newest_before(step: int, processes: int) -> int:
    return step // SAVE_EVERY[processes] * SAVE_EVERY[processes]


def _spoilt(workdir: Path) -> list[str]:
    """Checkpoints with values that are not finite, or saved during the sequence."""
    import jax

    from flax_transformers.checkpointing.manager import find_checkpoint, restore_arrays

    found = []
    for folder in (workdir / "checkpoints").iterdir():
        if not folder.name.isdigit():
            continue
        leaves = jax.tree.leaves(restore_arrays(folder))
        if not all(math.isfinite(float(abs(leaf).max())) for leaf in leaves if leaf.size):
            found.append(f"step {folder.name} holds values that are not finite")
        if find_checkpoint(folder).meta["consecutive_skips"]:
            found.append(f"step {folder.name} was saved in a streak")
    return found


DAMAGES = {
    "flip": Damage(500, flip),
    "side": Damage(40, side),
    "unreadable": Damage(10, unreadable),
    "nan": Damage(20, nan),
}
