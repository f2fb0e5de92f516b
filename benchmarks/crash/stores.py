"""Damage to prepared data: a table of kinds. A new run must refuse it with one sentence.

Files that can be made again from the others, or that a complete store no longer needs, may also be
replaced or ignored: then the run must end in the state of a run with an undamaged store, bit for
bit.
"""

from __future__ import annotations

import gzip
import multiprocessing
import random
import shutil
import time
from pathlib import Path

from campaign import Campaign, fingerprint
from damages import Damage, Line
from jobs import ROOT, run_command, settings

SLOWEST_SECONDS = 60.0
"""For a refusal, start of the process included."""


def tokens(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """A file of the store of the campaign's text."""
    store = campaign.folder / "damaged-store"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(campaign.folder / "store", store)
    command = settings(campaign.folder, 1, {"data.store": store})
    return _damaged(campaign, rng, store, command, campaign.reference(1))


def images(campaign: Campaign, rng: random.Random, processes: int) -> Line:
    """A file of a store of a few images in MNIST's format."""
    source, store = campaign.folder / "mnist", campaign.folder / "image-store"
    options = {
        "data.source.path": source, "data.store": store, "phases.0.steps": 2,
        "optimizer.schedule.warmup-steps": 1,
        "phases.0.batch-size": 4, "evaluation.batch-size": 4, "logging.tensorboard": False,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [str(ROOT / "configs" / "vit_mnist.py"), *flags]
    shutil.rmtree(store, ignore_errors=True)
    _write_images(source)
    code, said, _ = _run(campaign, ["prepare", *command])
    if code != 0:
        return {"problems": [f"the images could not be prepared: {said[-400:]}"]}
    undamaged = campaign.folder / "reference-images"
    if not undamaged.exists():
        _run(campaign, ["train", *command, "--workdir", str(undamaged)])
    return _damaged(campaign, rng, store, command, fingerprint(undamaged))


def _damaged(
    campaign: Campaign,
    rng: random.Random,
    store: Path,
    command: list[str],
    undamaged: tuple[str, str],
) -> Line:
    files = sorted(
        path
        for path in store.rglob("*")
        if path.is_file() and path.stat().st_size and path.name not in _UNREAD
    )
    path, way = rng.choice(files), rng.choice(["flip", "zero", "cut", "longer", "remove"])
    raw = bytearray(path.read_bytes())
    place = rng.randrange(len(raw))
    if way == "flip":
        raw[place] ^= 1 << rng.randrange(8)
    elif way == "zero":
        raw = bytearray(len(raw)) if any(raw) else bytearray(b"\1" * len(raw))
    elif way == "cut":
        raw = raw[:place]
    elif way == "longer":
        raw += bytes(rng.randrange(1, 99))
    if way == "remove":
        path.unlink()
    else:
        path.write_bytes(raw)
    workdir = campaign.folder / "refused"
    shutil.rmtree(workdir, ignore_errors=True)
    code, said, seconds = _run(campaign, ["train", *command, "--workdir", str(workdir)])
    file = str(path.relative_to(store))
    shutil.rmtree(store)
    sentences = [line for line in said.splitlines() if line.startswith("flax-transformers: ")]
    problems = []
    if code == 0 and _is_dispensable(file, way):
        if fingerprint(workdir) != undamaged:
            problems.append("the run ended in another state than with an undamaged store")
    elif code != 2 or len(sentences) != 1 or "Traceback" in said:
        problems.append(f"exit code {code}: {said[-400:]}")
    elif str(store) not in sentences[0]:
        problems.append(f"the store is not named: {sentences[0]}")
    if seconds > SLOWEST_SECONDS:
        problems.append(f"took {seconds:.0f} s")
    return {"file": file, "way": way, "said": sentences[:1], "problems": problems}


_UNREAD = frozenset({"lock", ".lock"})
"""Files of a store that hold no data."""


def _is_dispensable(file: str, way: str) -> bool:
    """Whether a complete store is usable without ``file``.

    Without its manifest it is an incomplete one, which `train` completes.
    """
    kept = Path(file)
    if kept.name == "manifest.json":
        return way == "remove"
    return kept.parts[0] in ("windows", "report.json", "corpus.json")


def _run(campaign: Campaign, command: list[str]) -> tuple[int | None, str, float]:
    """Exit code, output and seconds of a command in one process."""
    log, began = campaign.folder / "command.txt", time.monotonic()
    log.write_text("")
    process = multiprocessing.Process(target=run_command, args=(command, {}, str(log)))
    process.start()
    process.join(10 * SLOWEST_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, log.read_text(errors="replace"), time.monotonic() - began


def _write_images(folder: Path) -> None:
    import numpy as np

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 10)):
        arrays = {
            "images": rng.integers(0, 256, (count, 28, 28), np.uint8),
            "labels": np.arange(count, dtype=np.uint8) % 10,
        }
        for kind, array in arrays.items():
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            path = folder / f"{split}-{kind}-idx{array.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), 1, mtime=0))


STORES = {"tokens": Damage(30, tokens), "images": Damage(30, images)}
