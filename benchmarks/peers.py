"""Compare training steps of two decoders with those of levanter and MaxText, compiled for TPUs.

    python benchmarks/peers.py [NAME ...] > result.md

Each table row is one training step, compiled ahead of time by the TPU compiler (as by
``flax-transformers plan``): AdamW, float32 parameters, bfloat16 activations and gradient
reductions, full recomputation of each layer, splash attention. A step takes minutes to compile;
NAME selects cases.

The figures of levanter and MaxText are those of their own training steps in the same setting,
compiled for the same topologies by libtpu 0.0.52 in November 2026; this script does not run them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from flax_transformers.families import gpt2, llama
from flax_transformers.models.config import ComputeConfig, TextConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.planning.plan import StepPlan, plan
from flax_transformers.planning.topology import devices_of
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One step with ``sequences`` of ``length`` tokens per chip; ``peer``: figures of others."""

    model: TextConfig
    topology: str
    mesh: MeshConfig
    length: int
    sequences: int
    peer: str
    feed_forward_chunk: int | None = None
    max_logits: int = 2**28


GPT2 = dataclasses.replace(gpt2.SIZES["gpt2"], dropout=0.0, attention_dropout=0.0)
LLAMA = llama.SIZES["llama-3-8b"]
V5E, V5P = MeshConfig(data=1, fsdp=16), MeshConfig(data=4, fsdp=16)
CASES = {
    "gpt2": Case(GPT2, "v5e:4x4", V5E, 1024, 256, "levanter: 72 sequences fit"),
    "llama": Case(LLAMA, "v5p:4x4x4", V5P, 4096, 52, "levanter: 42 sequences fit, MaxText: 31"),
    "llama-chunked": Case(
        LLAMA, "v5p:4x4x4", V5P, 4096, 60, "levanter: 42 sequences fit", feed_forward_chunk=512
    ),
    "llama-small-batch": Case(
        LLAMA,
        "v5p:4x4x4",
        V5P,
        4096,
        4,
        "levanter: 10.52 GiB of temporaries, 45.7 GB sent; MaxText: 13.17 GiB",
        feed_forward_chunk=256,
        max_logits=2**26,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    names = parser.parse_args().names or list(CASES)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"Compiled ahead of time with {versions}. GiB and GB of one chip.\n")
    heads = (
        "step", "chips", "mesh", "sequences x tokens", "fits", "temporaries", "their lower bound",
        "sent", "ideal", "FLOP, of the model's", "compiled in", "peers",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in names:
        print(f"| {' | '.join(row(name, CASES[name]))} |", flush=True)


def row(name: str, case: Case) -> tuple[str, ...]:
    """The cells of one case."""
    found = plan_of(case)
    sent = sum(one.sent_bytes for one in found.traffic) / 1e9
    used = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    temporaries = found.memory.temporaries
    return (
        name,
        f"{found.devices} x {case.topology.partition(':')[0]}",
        used,
        f"{case.sequences} x {case.length:,}",
        f"yes, {(found.memory.available or 0) / GIB - found.memory.total / GIB:.1f} left"
        if found.fits
        else f"no, needs {found.memory.total / GIB:.1f}",
        "-" if temporaries is None else f"{temporaries / GIB:.2f}",
        f"{lower_bound(case, found) / GIB:.2f}",
        f"{sent:.1f}" if found.traffic else "-",
        f"{ideal(case, found) / 1e9:.1f}",
        "-" if found.recomputation is None else f"{found.recomputation:.2f}",
        f"{found.compile_seconds:.0f} s",
        case.peer,
    )


def plan_of(case: Case) -> StepPlan:
    """The plan of a case; its data are not read."""
    devices = devices_of(case.topology)
    phase = Phase(steps=1000, sequence_length=case.length, batch_size=case.sequences * len(devices))
    config = dataclasses.replace(
        _base(),
        model=case.model,
        objective=CausalLM(attend_across=True, max_logits=case.max_logits),
        optimizer=AdamW(learning_rate=3e-4),
        phases=(phase,),
        mesh=case.mesh,
        compute=ComputeConfig(
            dtype="auto", remat="full", feed_forward_chunk=case.feed_forward_chunk
        ),
        evaluation=Evaluation(batch_size=phase.batch_size),
    )
    return plan(config, phase, devices, case.topology)


def lower_bound(case: Case, found: StepPlan) -> float:
    """Temporaries of any schedule, in bytes: the bfloat16 input of each layer, and the float32
    gradients of this chip's parameters."""
    tokens = case.sequences * case.length
    return tokens * case.model.num_layers * case.model.hidden_size * 2 + found.memory.parameters


def ideal(case: Case, found: StepPlan) -> float:
    """Bytes sent in bfloat16 if every parameter is gathered once per pass and its gradient is
    reduced once: all parameters over fsdp, twice those of a chip over data."""
    whole = found.memory.parameters / 4 * found.mesh["fsdp"] * 2
    fsdp, data = found.mesh["fsdp"], found.mesh.get("data", 1)
    return 3 * whole * (fsdp - 1) / fsdp + 2 * whole / fsdp * (data - 1) / data


def _base() -> TrainConfig:
    """The config that the cases change: configs/gpt2_small.py."""
    path = Path(__file__).parents[1] / "configs" / "gpt2_small.py"
    spec = importlib.util.spec_from_file_location("gpt2_small", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


if __name__ == "__main__":
    sys.exit(main())
