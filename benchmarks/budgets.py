"""Compile training steps of large recipes for TPUs and compare them with their budgets.

    python benchmarks/budgets.py [NAME ...]            # exit code 1 if a figure exceeds its budget
    python benchmarks/budgets.py [NAME ...] --update   # write the figures as the new budgets

Each step is the one that ``train`` runs, compiled ahead of time by the TPU compiler, as by
``flax-transformers plan``: dropout, optimizer and gradient reductions included. The figures are
those of one chip. ``budgets.json`` has the largest memory, bytes sent over each set of mesh axes,
FLOPs of the program divided by those of the model, and the lower bound of the step time. A figure
exceeds its budget if it is more than 2 % above it. A step takes about a minute to compile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from flax_transformers.cli.config_file import load_config
from flax_transformers.planning.plan import GIB, plan
from flax_transformers.planning.topology import devices_of

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_name("budgets.json")
TOLERANCE = 0.02
TOPOLOGIES = {
    "gpt2_small": "v5e:4x4",
    "bert_large": "v5e:8x8",
    "vit_h14_imagenet2012": "v5e:8x8",
    "t5_v1_1_xxl": "v5e:16x16",
    "llama3_8b": "v5p:4x4x4",
    "mixtral_8x7b": "v5p:4x4x8",
}


def figures(name: str) -> dict[str, float]:
    """Figures of the last phase of recipe ``name`` on its topology, for one chip.

    Memory in GiB, traffic in GB by mesh axes, the bound of the step time in milliseconds.
    """
    config = load_config(str(ROOT / "configs" / f"{name}.py"), [])
    found = plan(config, config.phases[-1], devices_of(TOPOLOGIES[name]), TOPOLOGIES[name])
    if found.recomputation is None or found.roofline is None:
        raise SystemExit(f"{name}: the compiled program cannot be read, or needs too much memory")
    sent: dict[str, float] = {}
    for row in found.traffic:
        key = f"sent_over_{'+'.join(row.axes)}_gb"
        sent[key] = sent.get(key, 0.0) + row.sent_bytes / 1e9
    rounded = {
        "memory_gib": found.memory.total / GIB,
        **dict(sorted(sent.items())),
        "flops_over_model": found.recomputation,
        "step_at_least_ms": found.roofline.step * 1e3,
    }
    return {key: float(f"{value:.5g}") for key, value in rounded.items()}


def excesses(name: str, measured: dict[str, float]) -> list[str]:
    """One sentence for each figure above its budget; traffic without a budget may be 1 MB."""
    budget = read()["steps"][name]
    problems = []
    for key, value in measured.items():
        limit = budget.get(key, 0.001)
        if value > limit * (1 + TOLERANCE):
            above = f"{value / limit - 1:.1%} above its budget of {limit:g}"
            problems.append(f"{name}: {key} is {value:g}, {above}")
    return problems


def read() -> dict[str, Any]:
    """The versions that the budgets were written with, and ``steps``: the budgets by name."""
    return json.loads(FILE.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TOPOLOGIES)}")
    parser.add_argument("--update", action="store_true", help="write the figures as the budgets")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(TOPOLOGIES))
    if unknown:
        parser.error(f"there is no step {unknown[0]}; name some of {', '.join(TOPOLOGIES)}")
    written = read() if FILE.exists() else {"steps": {}}
    problems = []
    for name in arguments.names or list(TOPOLOGIES):
        measured = figures(name)
        print(f"{name} on {TOPOLOGIES[name]}", flush=True)
        for key, value in measured.items():
            budget = written["steps"].get(name, {}).get(key)
            change = "" if not budget else f"   budget {budget:g} ({value / budget - 1:+.1%})"
            print(f"  {key:28} {value:10.5g}{change}", flush=True)
        if arguments.update:
            written["steps"][name] = measured
            versions = {one: importlib.metadata.version(one) for one in ("jax", "libtpu")}
            FILE.write_text(json.dumps(versions | {"steps": written["steps"]}, indent=1) + "\n")
        else:
            problems += excesses(name, measured)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
