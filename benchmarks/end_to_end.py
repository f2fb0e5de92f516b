"""Masked-LM pretraining on real text, by this package and by Hugging Face's Trainer, side by side.

    python benchmarks/end_to_end.py [--torch-python PYTHON] [--json FILE] > result.md

Both train the same BERT from the same tokenizer on the same text, in float32, with AdamW and
clipping: ours as ``flax-transformers train`` does, theirs with ``Trainer`` and
``DataCollatorForLanguageModeling``. Theirs has two variants: ``lines`` pads each paragraph to the
longest of its batch, as ``run_mlm.py --line_by_line`` does; ``blocks`` concatenates paragraphs and
cuts them into full sequences, as ``run_mlm.py`` does by default.

Useful tokens are tokens that are not padding. Their rate is over the steps after the first; the
start is the time from the command to the end of the first step, with imports, reading of the data
and compilation, once with empty caches and once more. Variants run in turn, ``--rounds`` times.
Torch may be in another environment, with transformers, datasets and accelerate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import about

from flax_transformers.parallel.host_memory import memory_settings

HERE = Path(__file__).parent
LENGTH = 128
BATCH = 32
SIZES = {
    # layers, width, heads: google/bert_uncased_L-4_H-256 and L-12_H-768
    "mini": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 1024},
    "base": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
}
VARIANTS = ("ours", "lines", "blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    options = parser.parse_args()
    _check_torch(options.torch_python)
    with tempfile.TemporaryDirectory() as folder:
        prepared = _prepared(Path(folder), options)
        runs: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for variant in VARIANTS:
                found = run(variant, number, prepared, options)
                runs.append(found)
                print(f"{variant} {number}: {found['rate']:,.0f} useful tokens/s", file=sys.stderr)
    print(table(runs))
    if options.json:
        options.json.write_text(json.dumps({"about": _about(options), "runs": runs}, indent=1))


def _check_torch(python: str) -> None:
    command = [python, "-c", "import torch, transformers, datasets, accelerate"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        print(
            f"{python} cannot import torch, transformers, datasets and accelerate; name an "
            "interpreter that can with --torch-python",
            file=sys.stderr,
        )
        sys.exit(2)


def _prepared(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer, the text as one paragraph per line, and our config; nothing of it is timed."""
    command = [sys.executable, str(HERE / "trainers/prepare.py")]
    settings = {
        "folder": str(folder),
        "model": SIZES[options.size],
        "length": LENGTH,
        "batch": BATCH,
        "steps": options.steps,
    }
    subprocess.run([*command, json.dumps(settings)], check=True)
    return settings


def run(
    variant: str, number: int, settings: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One run of a variant: seconds until the first step was taken, and useful tokens a second."""
    folder = Path(settings["folder"])
    result = folder / "result.json"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    script, python = "trainers/theirs.py", options.torch_python
    if variant == "ours":
        script, python = "trainers/ours.py", sys.executable
        environment |= memory_settings()  # as the command ``train`` does
    asked = json.dumps(settings | {"variant": variant, "run": number, "result": str(result)})
    started = time.time()
    subprocess.run([python, str(HERE / script), asked], check=True, env=environment)
    found = json.loads(result.read_text())
    steps = found["times"]  # seconds since 1970, after each step
    return {
        "variant": variant,
        "round": number,
        "start_s": steps[0] - started,
        "step_s": statistics.median(b - a for a, b in itertools.pairwise(steps)),
        "rate": sum(found["useful_tokens"][1:]) / (steps[-1] - steps[0]),
        "useful_share": statistics.mean(found["useful_tokens"]) / statistics.mean(found["tokens"]),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Medians over the rounds, and our rate divided by theirs."""
    lines = [
        "| trainer | useful tokens/s (least to most) | of all tokens | step | start, cold | again "
        "| ours / this |",
        "|---|---|---|---|---|---|---|",
    ]
    by_variant = {name: [run for run in runs if run["variant"] == name] for name in VARIANTS}
    rate = {name: statistics.median(run["rate"] for run in of) for name, of in by_variant.items()}
    for name, of in by_variant.items():
        rates = sorted(run["rate"] for run in of)
        again = statistics.median([run["start_s"] for run in of[1:]] or [of[0]["start_s"]])
        cells = (
            name,
            f"{rate[name]:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})",
            f"{of[0]['useful_share']:.0%}",
            f"{statistics.median(run['step_s'] for run in of):.3f} s",
            f"{of[0]['start_s']:.1f} s",
            f"{again:.1f} s",
            f"{rate['ours'] / rate[name]:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {**about(), "size": options.size, "batch": f"{BATCH} x {LENGTH}", "steps": options.steps}


if __name__ == "__main__":
    main()
