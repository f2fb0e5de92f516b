"""How time and memory of a training step grow with the model, the batch and the devices.

    python benchmarks/growth.py [--axes depth length ...] --json growth.json --plot growth.png

A small GPT-2 in float32 is changed along one axis at a time. Each point is a process of its own,
which compiles the step that ``train`` runs, without a compilation cache, and takes ``--steps``
steps after a first one. The table has, for each axis, the exponent e of a quantity ~ value^e,
fitted over all values and between the two largest, beside that of the step's matmul FLOPs: for
devices, which here share the machine's cores, the work is the same whatever their number. Memory is
that of one device as the compiler states it: the state (parameters, optimizer state, batch), and
what the step needs besides. For lengths each layer is computed again in the backward pass, and the
model has two heads, because attention with dropout holds [B, N, T, T] on a CPU. Points that
``--json`` has are not measured again, so that an interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

AXES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "depth": ({}, (6, 12, 24, 48)),
    "depth, unrolled": ({"scan": False}, (6, 12, 24)),
    "width": ({}, (128, 256, 512, 1024)),
    "length": ({"batch": 1, "width": 128, "remat": "full"}, (128, 512, 2048, 8192)),
    "batch": ({}, (1, 2, 4, 8, 16, 32)),
    "devices": ({}, (1, 2, 4, 8)),
    "vocabulary": ({"depth": 2}, (32_768, 65_536, 131_072, 262_144)),
}
"""Of each axis what differs from ``BASE`` at all its values, and the values."""
BASE = {"depth": 6, "width": 256, "length": 256, "batch": 8, "devices": 1, "vocabulary": 8192}
QUANTITIES = {
    "seconds": "seconds of a step",
    "flops": "matmul FLOPs",
    "state_bytes": "bytes of the state",
    "temporary_bytes": "bytes of a step besides",
    "compile_seconds": "seconds to compile",
}


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(measured(**json.loads(options.measure), steps=options.steps)))
        return
    found = Path(options.json) if options.json else None
    rows: list[dict[str, Any]] = json.loads(found.read_text()) if found and found.exists() else []
    done = {(row["axis"], row["value"]) for row in rows}
    for axis in options.axes:
        fixed, values = AXES[axis]
        for value in values:
            if (axis, value) in done:
                continue
            point = BASE | fixed | {axis.partition(",")[0]: value}
            print(f"{axis} {value}", file=sys.stderr, flush=True)
            rows.append({"axis": axis, "value": value, **_in_a_process(point, options.steps)})
            if found:
                found.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if options.plot:
        plot(rows, Path(options.plot))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each point")
    parser.add_argument("--json", help="also write the measurements to this file")
    parser.add_argument("--plot", help="also draw them into this PNG file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(point: dict[str, Any], steps: int) -> dict[str, Any]:
    from flax_transformers.parallel.host_memory import memory_settings

    command = [sys.executable, __file__, "--steps", str(steps), "--measure", json.dumps(point)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    done = subprocess.run(
        command, env=environment | memory_settings(), stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(
    *, depth: int, width: int, length: int, batch: int, devices: int, vocabulary: int,
    steps: int, scan: bool = True, remat: str = "none",
) -> dict[str, Any]:  # fmt: skip
    """The quantities of one point, measured in this process."""
    import jax
    from steps.cases import Case
    from steps.ours import trainer_of

    from flax_transformers.families.gpt2 import SIZES
    from flax_transformers.monitoring.model_flops import step_flops
    from flax_transformers.objectives.causal_lm import CausalLM
    from flax_transformers.training.setup import shapes_and_axes

    jax.config.update("jax_num_cpu_devices", devices)
    model = dataclasses.replace(
        SIZES["gpt2"],
        num_layers=depth,
        hidden_size=width,
        intermediate_size=4 * width,
        num_heads=width // 64,
        max_positions=length,
        vocab_size=vocabulary,
    )
    objective = CausalLM(attend_across=True)
    case = Case(model, objective, batch, length, dict)
    trainer = trainer_of(case, "float32", scan=scan, remat=remat)
    state, rows = trainer.init(), trainer.place(case.rows())
    with jax.set_mesh(trainer.mesh):
        began = time.perf_counter()
        step = trainer.train_step().lower(state, rows).compile()
        compiled = time.perf_counter() - began
        memory = step.memory_analysis()
        seconds = []
        for _ in range(1 + steps):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, rows))
            seconds.append(time.perf_counter() - began)
    flops = step_flops(
        model, objective, *shapes_and_axes(model), batch_size=batch, sequence_length=length
    )
    return {
        "all_seconds": seconds[1:],
        "seconds": statistics.median(seconds[1:]),
        "compile_seconds": compiled,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": flops,
    }


def exponent(values: list[float], quantities: list[float]) -> float:
    """The e of quantity ~ value^e, by least squares of the logarithms."""
    return float(np.polyfit(np.log(values), np.log(quantities), 1)[0])


def table(rows: list[dict[str, Any]]) -> str:
    """Exponents of each axis: fitted over all values / between the two largest."""
    heads = ("axis", "values", *QUANTITIES.values())
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for axis in dict.fromkeys(row["axis"] for row in rows):
        of = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in of]
        cells = [axis, f"{values[0]:,} to {values[-1]:,}"]
        for name in QUANTITIES:
            found = [row[name] for row in of]
            cells.append(f"{exponent(values, found):.2f} / {exponent(values[-2:], found[-2:]):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A column for each axis: seconds, memory, and FLOPs as a line through the last point."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure((3.2 * len(axes), 5.6), 120, layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        of = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in of]
        upper, lower = panels[:, column]
        last = of[-1]
        theory = [last["seconds"] * row["flops"] / last["flops"] for row in of]
        upper.plot(values, [row["seconds"] for row in of], "o-", label="step")
        upper.plot(values, theory, "--", color="gray", label="as its matmul FLOPs")
        upper.plot(values, [row["compile_seconds"] for row in of], "s:", label="compilation")
        lower.plot(values, [row["state_bytes"] / 2**20 for row in of], "o-", label="state")
        lower.plot(
            values, [row["temporary_bytes"] / 2**20 for row in of], "s-", label="step besides"
        )
        upper.set_title(axis)
        for panel in (upper, lower):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
            panel.minorticks_off() if math.log10(values[-1] / values[0]) > 1 else None
            panel.grid(color="#e5e7eb", linewidth=0.8)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("MiB of one device")
    for row in panels:
        row[0].legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
