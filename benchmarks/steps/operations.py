"""Where a training step of this package spends its time, beside its matrix products alone."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData
from steps.cases import Case
from steps.ours import trainer_of

from flax_transformers import runtime
from flax_transformers.planning.hlo_text import (
    Computation,
    Instruction,
    Module,
    parse_module,
    trip_count,
)

STEPS = 3
ROWS = 30


def profile(name: str, case: Case, dtype: str, *, scan: bool) -> None:
    """Print the time of each operation of a step, summed over threads, and the matmul bound.

    Operations are added up over layers: those of one kind and origin, with results of one shape.
    The bound is the time of all matrix products of the program, each run alone.
    """
    runtime.start(None)
    trainer = trainer_of(case, dtype, scan=scan)
    state, batch = trainer.init(), trainer.place(case.rows())
    with jax.set_mesh(trainer.mesh), tempfile.TemporaryDirectory() as folder:
        step = trainer.train_step().lower(state, batch).compile()
        seconds = []
        for number in range(2 + 2 * STEPS):
            if number == 2 + STEPS:
                jax.profiler.start_trace(folder)
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - began)
        jax.profiler.stop_trace()
        program = parse_module(step.as_text())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        spent = _spent(ProfileData.from_file(str(trace)), program)
    took = min(seconds[2 : 2 + STEPS])
    bound = sum(runs * _alone(*product) for product, runs in _products(program).items())
    total = sum(spent.values())
    layers = "scanned" if scan else "unrolled"
    print(f"\n{name}, {dtype}, {layers}: {took:.2f} s a step; its matrix products alone", end=" ")
    print(f"{bound:.2f} s. Operations took {total:.2f} s, summed over threads.\n")
    print("| s | share | operation | result | origin |\n|---|---|---|---|---|")
    for (kind, result, origin), of in spent.most_common(ROWS):
        print(f"| {of:.3f} | {of / total:.1%} | {kind} | {result} | {origin} |")


def _spent(trace: ProfileData, program: Module) -> Counter[tuple[str, str, str]]:
    """Seconds of a step by kind, result and origin of the operation, without those inside it."""
    known = {one.name: one for part in program.computations.values() for one in part}
    spent: Counter[tuple[str, str, str]] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for name, seconds in _own_times(line):
                if name in known:
                    spent[_label(known[name])] += seconds / STEPS  # type: ignore[assignment]
    return spent


def _own_times(line: Any) -> Iterator[tuple[str, float]]:
    """Name and seconds of each event of a thread, less those of the events inside it."""
    events = sorted((e.start_ns, -e.duration_ns, e.name) for e in line.events)
    inside: list[list[Any]] = []  # end, name, own nanoseconds
    for start, less, name in events:
        while inside and inside[-1][0] <= start:
            _, of, own = inside.pop()
            yield of, own / 1e9
        if inside:
            inside[-1][2] += less
        inside.append([start - less, name, -less])
    for _, of, own in inside:
        yield of, own / 1e9


def _label(one: Instruction) -> tuple[str, str, str]:
    kind = re.sub(r"[.\d]+$", "", one.name)
    way = "backward" if "transpose(" in one.op_name else "forward"
    origin = "/".join(one.op_name.split("/")[-2:])
    return kind, str(one.arrays[0]) if one.arrays else "", f"{way} {origin}" if origin else ""


Product = tuple[Any, ...]
"""Shapes, dtypes and dimension numbers of a ``dot``."""


def _products(program: Module) -> Counter[Product]:
    """How often each matrix product runs in a step."""
    found: Counter[Product] = Counter()

    def walk(part: Computation, runs: int) -> None:
        for one in part:
            if one.opcode == "while":
                rounds = trip_count(one, part, program) or 1
                walk(program.computations[one.attribute("body") or ""], runs * rounds)
            elif one.opcode == "dot":
                found[_product(one, part)] += runs
            for name in ("calls", "to_apply"):
                if one.opcode in ("fusion", "call") and one.attribute(name):
                    walk(program.computations[one.attribute(name) or ""], runs)

    walk(program.entry, 1)
    return found


def _product(one: Instruction, inside: Computation) -> Product:
    sides = [inside.instructions[name].arrays[0] for name in one.operands]
    numbers = [
        tuple(one.integers(f"{side}_{axes}_dims"))
        for axes in ("contracting", "batch")
        for side in ("lhs", "rhs")
    ]
    return (*((a.shape, _DTYPES.get(a.dtype, "float32")) for a in sides), *numbers)


_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def _alone(a: Any, b: Any, *numbers: tuple[int, ...]) -> float:
    """Seconds of a product that nothing else runs beside."""
    contract_a, contract_b, batch_a, batch_b = numbers
    operands = [jnp.ones(shape, dtype) for shape, dtype in (a, b)]

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = (contract_a, contract_b), (batch_a, batch_b)
        return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)

    product(*operands).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(*operands).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
