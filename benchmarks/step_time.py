"""Training steps of this package and of Hugging Face's models in torch, side by side.

    python benchmarks/step_time.py [--torch-python PYTHON] [--models NAME ...] > result.md

A step is forward, backward, clipping by the global norm and AdamW, with dropout as published, on
the same batch of random content. Ours is the step that ``train`` runs, which also skips updates
that are not finite. Each variant is a process of its own; they take ``--turn`` steps in turn until
each has taken ``--steps``, so that a change of the machine's speed affects all of them. The first
step of a turn is not counted. Torch may be in another environment, whose interpreter is
``--torch-python``.

``--profile`` prints instead where our step spends its time, beside the time of its matrix products
alone on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from about import about
from steps.cases import PRESETS, Case
from steps.turns import Failed, Worker

from flax_transformers.huggingface.family import config_json
from flax_transformers.parallel.host_memory import memory_settings

HERE = Path(__file__).parent
OURS = {"scanned": {"scan": True}, "unrolled": {"scan": False}}
THEIRS = {"torch": {"compile": False}, "torch-compile": {"compile": True}}


def main() -> None:
    options = _options()
    _check_torch(options)
    if options.profile:
        from steps.operations import profile

        for name in options.models:
            for dtype in options.dtypes:
                profile(
                    name, PRESETS[options.preset][name], dtype, scan="scanned" in options.variants
                )
        return
    print(_heading(options))
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for dtype in options.dtypes:
            found = measure(name, PRESETS[options.preset][name], dtype, options)
            if not found:
                continue
            rows += found
            print(_line(found, options), flush=True)
            if options.json:
                written = {"about": _about(rows), "rows": rows}
                Path(options.json).write_text(json.dumps(written, indent=1) + "\n")
    if not rows:
        _stop("no variant of any model ran; see the errors above")
    print("\nLeast / median seconds of a step.", end=" ")
    print(", ".join(f"{key}: {value}" for key, value in _about(rows).items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="which table of models")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: the whole table")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--variants", nargs="+", choices=(*OURS, *THEIRS), default=[*OURS, *THEIRS])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant")
    parser.add_argument(
        "--turn", type=int, default=3, help="timed steps that a variant takes at once"
    )
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument(
        "--memory-settings-for-torch",
        action="store_true",
        help="let torch too allocate memory as `flax-transformers train` does on the CPU",
    )
    parser.add_argument("--profile", action="store_true", help="print where our step goes")
    parser.add_argument("--json", help="also write the measurements to this file")
    options = parser.parse_args()
    table = PRESETS[options.preset]
    options.models = options.models or list(table)
    for name in options.models:
        if name not in table:
            _stop(f"{name} is not in the preset {options.preset}; choose of {', '.join(table)}")
    return options


def _check_torch(options: argparse.Namespace) -> None:
    """Ends the program unless torch is there, or not needed."""
    if options.profile or not set(THEIRS) & set(options.variants):
        return
    command = [options.torch_python, "-c", "import torch, transformers"]
    with contextlib.suppress(OSError):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
    _stop(
        f"{options.torch_python} cannot import torch and transformers; name an interpreter that "
        "can with --torch-python, or choose --variants scanned unrolled"
    )


def _stop(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def measure(name: str, case: Case, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant that ran."""
    batch = case.rows()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        np.savez(Path(folder) / "batch.npz", **case.for_huggingface(batch))
        (Path(folder) / "config.json").write_text(json.dumps(config_json(case.model)))
        workers: dict[str, Worker] = {}
        for variant in options.variants:
            command, environment = _command(variant, name, dtype, Path(folder), options)
            try:
                worker = Worker(command, environment, Path(folder) / f"{variant}.txt")
                workers[variant] = stack.enter_context(worker)
            except Failed as failure:
                print(f"{name} {dtype} {variant} failed:\n{failure}", file=sys.stderr)
        for _ in range(-(-options.steps // options.turn)):
            for worker in workers.values():
                worker.take(options.turn)
        return [
            {
                "model": name,
                "dtype": dtype,
                "variant": variant,
                "unit": case.unit,
                "count": case.count(batch),
                "seconds": worker.seconds,
                **worker.about,
            }
            for variant, worker in workers.items()
        ]


def _command(
    variant: str, name: str, dtype: str, folder: Path, options: argparse.Namespace
) -> tuple[list[str], dict[str, str]]:
    """The command of a variant's process, and its environment."""
    # Several processes share one GPU: none of them may take all its memory at the start.
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if variant in OURS or options.memory_settings_for_torch:
        environment |= memory_settings()  # as the command ``train`` does
    if variant in OURS:
        asked = {"preset": options.preset, "model": name, "dtype": dtype, **OURS[variant]}
        return [sys.executable, str(HERE / "steps/ours.py"), json.dumps(asked)], environment
    # A killed process of an earlier time can have left half a library in the common cache.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    files = {"config": str(folder / "config.json"), "batch": str(folder / "batch.npz")}
    asked = {**files, "dtype": dtype, **THEIRS[variant]}
    return [options.torch_python, str(HERE / "steps/theirs.py"), json.dumps(asked)], environment


def _heading(options: argparse.Namespace) -> str:
    variants = [f"{variant}, s" for variant in options.variants]
    names = ("model", "dtype", "batch", *variants, "ours per second", "ratio of medians")
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def _line(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """One model in one dtype: least and median seconds, our rate, and our gain."""
    seconds = {row["variant"]: row["seconds"] for row in rows}
    medians = {variant: statistics.median(of) for variant, of in seconds.items()}
    ours, theirs = (
        min((medians[variant] for variant in side if variant in medians), default=None)
        for side in (OURS, THEIRS)
    )
    unit, count = rows[0]["unit"], rows[0]["count"]
    cells = [
        f"{min(seconds[variant]):.2f} / {medians[variant]:.2f}" if variant in seconds else "-"
        for variant in options.variants
    ]
    rate = f"{count / ours:,.0f} {unit}" if ours else "-"
    ratio = f"{theirs / ours:.2f}" if ours and theirs else "-"
    cells = [rows[0]["model"], rows[0]["dtype"], f"{count:,} {unit}", *cells, rate, ratio]
    return f"| {' | '.join(cells)} |"


def _about(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Date, hardware, versions and commit of a table."""
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    return {**about(), "device": rows[0]["device"], **versions}


if __name__ == "__main__":
    main()
