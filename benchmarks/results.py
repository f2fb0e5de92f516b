"""Print the table of docs/results.md from the workdirs of completed runs.

    python benchmarks/results.py runs/bert_books_0 runs/bert_books_1 runs/bert_books_2 ...

Runs whose configs differ only in the seed share a table row, named after the first workdir without
the seed at its end. A row has the held-out score (mean and half the range over the seeds), the
score of each baseline (``baselines.json`` in a workdir), and the margin of the worst seed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flax_transformers.config_json import from_json

HEADINGS = (
    "recipe",
    "objective",
    "data",
    "steps",
    "examples",
    "minutes",
    "held-out",
    "baseline",
    "margin",
)


def main(workdirs: list[Path]) -> None:
    runs: dict[str, list[Path]] = {}
    for workdir in workdirs:
        config = json.loads((workdir / "config.json").read_text())
        runs.setdefault(json.dumps(config | {"seed": None, "init_from": None}), []).append(workdir)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for config_text, alike in runs.items():
        for cells in rows_of(json.loads(config_text), alike):
            print(f"| {' | '.join(cells)} |")


def rows_of(config: dict[str, Any], workdirs: list[Path]) -> list[list[str]]:
    """One row of cells for each metric that has a baseline."""
    every = [_rows(workdir / "metrics.jsonl") for workdir in workdirs]
    steps = sum(phase["steps"] for phase in config["phases"])
    examples = sum(phase["steps"] * phase["batch_size"] for phase in config["phases"])
    minutes = [(rows[-1]["time"] - rows[0]["time"]) / 60 for rows in every]
    cells = [
        f"`{workdirs[0].name.rstrip('0123456789').rstrip('_')}`",
        type(from_json(config["objective"])).__name__,
        Path(config["data"].get("source", {}).get("path", "mixture")).name,
        f"{steps:,}",
        f"{examples:,}",
        "–".join(sorted({f"{few:.0f}" for few in (min(minutes), max(minutes))}, key=float)),
    ]
    table = []
    guesses = [json.loads((workdir / "baselines.json").read_text()) for workdir in workdirs]
    for alike in zip(*guesses, strict=True):  # fitted baselines differ slightly between seeds
        baseline, metric = alike[0], alike[0]["metric"]
        scores = [next(row[metric] for row in reversed(rows) if metric in row) for rows in every]
        sign = -1 if metric.startswith("eval/loss") else 1
        margin = min(sign * (s - g["score"]) for s, g in zip(scores, alike, strict=True))
        guess = sum(one["score"] for one in alike) / len(alike)
        mean, spread = sum(scores) / len(scores), (max(scores) - min(scores)) / 2
        unit = metric.removeprefix("eval/").replace("_", " ")
        held_out = f"{unit} {mean:.3f}"
        held_out += f" ± {spread:.3f} ({len(scores)} seeds)" if len(scores) > 1 else " (one seed)"
        beaten = f"{baseline['name']} {guess:.3f} on {baseline['counted']}"
        table.append([*cells, held_out, beaten, f"{margin:+.3f}"])
        cells = [""] * len(cells)
    return table


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/results.py WORKDIR ...")
    main([Path(argument) for argument in sys.argv[1:]])
