"""Ahead-of-time plans of a training step: memory, FLOPs, traffic, and a bound on its speed.

The step is the one that ``train`` runs, compiled by the compiler of the target. Memory is the
compiler's analysis. Matmuls, collectives and memory traffic are counted in the optimised program
(``planning.hlo_cost``), and a roofline over them bounds the speed.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import Placement, base_keeps_logits
from flax_transformers.models.config import EncoderDecoderConfig, TransformerConfig
from flax_transformers.monitoring.device_specs import DeviceSpec, device_spec
from flax_transformers.parallel.rules import batch_sharding
from flax_transformers.planning.hlo_cost import SLICES, Collective, HloCost, KernelCall, account
from flax_transformers.planning.hlo_text import Array
from flax_transformers.planning.topology import silenced
from flax_transformers.storage.workdir import write_text
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.dummy_batch import abstract_batch
from flax_transformers.training.setup import (
    checked_mesh,
    fastest_compute,
    make_trainer,
    phase_flops,
)
from flax_transformers.training.trainer import Trainer

GIB = 2**30

# Matrix products per kernel, by suffix of its name: JAX's splash attention, and our
# models/kernels/flash_attention.py.
_PRODUCTS = {"_fwd": 2, "_dkv": 4, "_dq": 3}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device; ``total`` must fit. Parts are None if the compilation failed for it."""

    parameters: int
    optimizer: int
    """Optimizer state, and the EMA of the parameters if there is one."""
    other_models: int | None
    """Parameters of a reference or a teacher; None without one, and if its config is not there."""
    batch: int
    padding: int | None
    """Padding of arguments to the tiles of the device."""
    temporaries: int | None
    """Activations, gradients, and buffers of the compiler."""
    output: int | None
    """Results that do not reuse the buffers of the donated state."""
    program: int | None
    total: int
    available: int | None
    """Memory for programs; None for a device without a device spec."""

    @property
    def state(self) -> int:
        """Bytes that stay allocated between steps."""
        return self.parameters + self.optimizer + (self.other_models or 0)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step by collectives of one kind over the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    runs: int
    sent_bytes: float


@dataclass(frozen=True)
class Roofline:
    """Lower bounds of the seconds of a step: each resource at its peak, all in parallel."""

    compute: float
    memory: float
    interconnect: dict[str, float]
    """By mesh axes, joined by "+"; each is a ring over links of its own."""

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, *self.interconnect.values())

    def without(self, part: Roofline) -> Roofline:
        """That of the rest of a program, of which ``part`` is a part."""
        links = {
            name: s - part.interconnect.get(name, 0.0) for name, s in self.interconnect.items()
        }
        return Roofline(self.compute - part.compute, self.memory - part.memory, links)

    @property
    def bound_by(self) -> str:
        """The resource with the longest time."""
        parts = {"matmuls": self.compute, "memory": self.memory, **self.interconnect}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class StepPlan:
    """One step of one phase on one mesh. FLOPs and bytes are of one device."""

    topology: str
    devices: int
    chip: str
    mesh: dict[str, int]
    remat: str
    batch_shape: tuple[int, ...]
    micro_batches: int
    memory: Memory
    fits: bool
    model_flops: float
    """FLOPs of the model by the convention of MFU."""
    program_flops: float | None
    """FLOPs of matmuls and kernels in the compiled program; None without one."""
    memory_bytes: float | None
    traffic: tuple[Traffic, ...]
    roofline: Roofline | None
    mfu_bound: float | None
    instructions: int | None
    lower_seconds: float
    compile_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def recomputation(self) -> float | None:
        """FLOPs of the program divided by FLOPs of the model."""
        return None if self.program_flops is None else self.program_flops / self.model_flops


def plan(
    config: TrainConfig,
    phase: AnyPhase,
    devices: Sequence[jax.Device],
    topology: str,
    *,
    hlo: Path | None = None,
    teacher: TransformerConfig | None = None,
) -> StepPlan:
    """Compile the training step of ``phase`` for ``devices``, which need not be present.

    The optimised program is also written to ``hlo``, if given. The parameters of a ``teacher`` are
    counted.

    ``phase`` is one of the config's. Raises UserError for a config that could not run: a mesh that
    does not fit the devices, or does not divide a batch of a phase or of the evaluation, or a model
    that does not fit the objective. A step that needs more memory than available is returned as a
    plan with ``fits`` False.
    """
    compute = fastest_compute(config.compute, devices[0].platform, len(devices))
    config = replace(config, compute=compute)
    mesh = checked_mesh(config, devices)
    trainer = make_trainer(config, mesh)
    other_models, note = _other_models(config, trainer, teacher)
    chip = device_spec(devices[0].device_kind)
    started = time.perf_counter()
    lowered = lower_train_step(config, trainer, phase)
    lowered_after = time.perf_counter() - started
    compiled, text, needed = compile_to_text(lowered)
    compiled_after = time.perf_counter() - started
    if hlo is not None and text is not None:
        write_text(epath.Path(hlo.expanduser().absolute()), text)
    memory = _memory(trainer, other_models, abstract_batch(config, phase), compiled, needed, chip)
    found = None if text is None else account(text, dict(mesh.shape), hosts=hosts_of(mesh))
    model_flops = phase_flops(config, phase) / mesh.size
    program_flops = None if found is None else flops_of(found, config.model)
    at_peak = None
    if chip is not None and found is not None and program_flops is not None:
        at_peak = roofline(found, program_flops, chip)
    return StepPlan(
        topology=topology,
        devices=mesh.size,
        chip=devices[0].device_kind,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        remat=config.compute.remat,
        batch_shape=phase.batch_shape,
        micro_batches=phase.micro_batches,
        memory=memory,
        fits=needed is None and not (memory.available and memory.total > memory.available),
        model_flops=model_flops,
        program_flops=program_flops,
        memory_bytes=None if found is None else found.memory_bytes,
        traffic=() if found is None else _traffic(found),
        roofline=at_peak,
        mfu_bound=None
        if chip is None or at_peak is None
        else model_flops / (at_peak.step * chip.peak_flops),
        instructions=None if found is None else found.num_instructions,
        lower_seconds=lowered_after,
        compile_seconds=compiled_after - lowered_after,
        notes=(*_notes(found, unreadable=compiled is not None and text is None), *note),
    )


def lower_train_step(config: TrainConfig, trainer: Trainer, phase: AnyPhase) -> jax.stages.Lowered:
    """The step of a phase, lowered for the devices of the trainer's mesh, without data."""
    batch = abstract_batch(config, phase)
    try:
        with jax.set_mesh(trainer.mesh):
            return trainer.train_step(phase.micro_batches).lower(trainer.abstract, batch)
    except RuntimeError as error:
        if "cuDNN not found" not in str(error):
            raise
        raise UserError(
            "the attention kernel 'cudnn' needs cuDNN, which is not installed; install "
            "nvidia-cudnn-cu12, or plan with --compute.attention xla"
        ) from error


def compile_to_text(
    lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled | None, str | None, int | None]:
    """The compiled program and its text, or the bytes it needs if these are too many."""
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=written)
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"memory required[^(]*\(([\d.]+)([KMGT])\)", str(error))
            if "Ran out of memory on HBM" not in str(error) or needed is None:
                raise
            return None, None, int(float(needed[1]) * 1024 ** ("KMGT".index(needed[2]) + 1))
        return compiled, _text(compiled, Path(folder)), None


def _text(compiled: jax.stages.Compiled, folder: Path) -> str | None:
    """The optimised program as text; None if it cannot be read.

    It is read from the compiler's dump if JAX cannot parse it: libtpu writes some asynchronous
    collectives in a form that jaxlib does not accept.
    """
    try:
        with silenced():
            return str(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        dumped = sorted(folder.glob("*after_optimizations.txt"))
        return dumped[-1].read_text() if dumped else None


def _memory(
    trainer: Trainer,
    other_models: int | None,
    batch: dict[str, jax.ShapeDtypeStruct],
    compiled: jax.stages.Compiled | None,
    needed: int | None,
    chip: DeviceSpec | None,
) -> Memory:
    state, sharding = trainer.abstract, batch_sharding(trainer.mesh)
    parameters, optimizer = (
        bytes_on_device(state.variables),
        bytes_on_device((state.opt_state, state.ema)),
    )
    rows = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in batch.values()
    )
    available = None if chip is None else chip.available_bytes
    if compiled is None:
        total = (needed or 0) + (other_models or 0)
        rest = None, None, None, None
        return Memory(parameters, optimizer, other_models, rows, *rest, total, available)
    found: Any = compiled.memory_analysis()
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    temporaries, arguments = found.temp_size_in_bytes, found.argument_size_in_bytes
    if arguments < found.peak_memory_in_bytes < arguments + temporaries:
        # Older versions of libtpu count reused buffers of the donated state as temporaries.
        temporaries = found.peak_memory_in_bytes - arguments
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        other_models=other_models,
        batch=rows,
        padding=max(0, found.argument_size_in_bytes - parameters - optimizer - rows),
        temporaries=temporaries,
        output=output,
        program=found.generated_code_size_in_bytes,
        total=arguments
        + temporaries
        + output
        + found.generated_code_size_in_bytes
        + (other_models or 0),
        available=available,
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes of one device's shards of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def flops_of(found: HloCost, model: TransformerConfig) -> float:
    """FLOPs of matmuls, and of kernels by the shapes of their operands."""
    return found.matmul_flops + sum(
        one.runs
        * (grouped_product_flops(one) or attention_kernel_flops(one, causal=_is_causal(one, model)))
        for one in found.kernels
    )


def grouped_product_flops(call: KernelCall) -> float:
    """Matmul FLOPs of one run of ``jax.lax.ragged_dot``; 0 for any other call.

    It multiplies rows [R, D] with the kernel of their group [E, D, F] to rows [R, F], or, for
    gradients, rows [R, D] and [R, F] to [E, D, F]: 2 R D F, padding rows included.
    """
    arrays = _floats((*call.operands, *call.results))
    if "ragged-dot" not in call.name or len(arrays) != 3:
        return 0.0
    # Each of the three lengths is in two of the arrays.
    return 2.0 * math.isqrt(math.prod(math.prod(array.shape[-2:]) for array in arrays))


def _is_causal(call: KernelCall, model: TransformerConfig) -> bool:
    if isinstance(model, EncoderDecoderConfig):
        return "decoder" in call.op_name and "cross_attention" not in call.op_name
    return getattr(model, "causal", False)


def attention_kernel_flops(call: KernelCall, *, causal: bool) -> float:
    """Matmul FLOPs of one run of an attention kernel; 0 for any other call.

    The first two floating-point operands of rank 3 or more are queries [..., N, T, H] and keys
    [..., K, S, H]. A forward pass has two matmuls (scores, values), a backward pass for queries
    three (scores, and the derivatives of probabilities and queries), one for keys and values four,
    one for all three five. A causal mask halves the work.
    """
    products = next((n for part, n in _PRODUCTS.items() if part in call.name), 0)
    inputs = _heads(call.operands)
    if not products or len(inputs) < 2:
        return 0.0
    queries, keys = inputs[:2]
    of_operands = [one for one in call.results if one.shape in (queries.shape, keys.shape)]
    if products == 4 and len(of_operands) > 2:
        products = 5  # the results include the derivative of queries
    return products * 2.0 * queries.size * keys.shape[-2] * (0.5 if causal else 1.0)


def _heads(several: Sequence[Array]) -> list[Array]:
    return [array for array in _floats(several) if len(array.shape) > 2]


def _floats(several: Sequence[Array]) -> list[Array]:
    return [array for array in several if array.dtype in ("bf16", "f16", "f32")]


def _traffic(found: HloCost) -> tuple[Traffic, ...]:
    """Collectives summed by kind and axes, largest first."""
    together: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in found.collectives:
        together.setdefault((one.kind, one.axes), []).append(one)
    rows = [
        Traffic(kind, axes, sum(c.runs for c in group), sum(c.sent_bytes for c in group))
        for (kind, axes), group in together.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.sent_bytes))


def roofline(found: HloCost, program_flops: float, chip: DeviceSpec) -> Roofline:
    """The roofline of one run of a program; ``program_flops`` include those of kernels."""
    interconnect: dict[str, float] = {}
    for one in found.collectives:
        name = "+".join(one.axes)
        interconnect[name] = interconnect.get(name, 0.0) + one.sent_bytes / _bandwidth(one, chip)
    return Roofline(
        compute=program_flops / chip.peak_flops,
        memory=found.memory_bytes / chip.memory_bandwidth,
        interconnect=interconnect,
    )


def hosts_of(mesh: Mesh) -> list[int]:
    """The host of each device, for GPUs; the torus of a TPU slice joins its hosts."""
    if mesh.devices.flat[0].platform == "tpu":
        return []
    return [device.process_index for device in mesh.devices.flat]


def _bandwidth(one: Collective, chip: DeviceSpec) -> float:
    """Bytes/s that a device sends. Each GPU of a host has a network adapter, and of a group on
    several hosts they all work for it, each in a ring of its own."""
    if one.axes == (SLICES,):
        return chip.network_bandwidth
    if one.per_host is None:
        return chip.ring_bandwidth
    return min(chip.ring_bandwidth, one.per_host * chip.network_bandwidth)


def _notes(found: HloCost | None, unreadable: bool) -> tuple[str, ...]:
    notes = []
    if unreadable:
        notes.append("the text of this program is not available: no FLOPs, no traffic")
    if found is not None and found.unknown:
        # Such as those over chunks of an expert that receives more rows than its capacity.
        notes.append(f"{len(found.unknown)} loops of data-dependent length, counted once")
    return tuple(notes)


def _other_models(
    config: TrainConfig, trainer: Trainer, teacher: TransformerConfig | None
) -> tuple[int | None, tuple[str, ...]]:
    """Bytes on each device of the model that a run holds beside the one that it trains, which no
    step has as an argument, and notes on it."""
    path = getattr(config.objective, "teacher", None)
    if teacher is not None:
        placed = Placement.of(build_model(teacher), jnp.float32, trainer.mesh)
        return bytes_on_device(placed.shapes), ("the teacher's own step needs further memory",)
    if path is not None:
        return None, (f"the parameters of {path} and its own step need further memory",)
    needs_reference = getattr(config.objective, "needs_reference", False)
    if needs_reference and not base_keeps_logits(trainer.adapters, trainer.model):
        return bytes_on_device(trainer.abstract_params), ()
    return None, ()


def advice(found: StepPlan) -> str:
    """One sentence for a plan that does not fit: the missing memory, and a remedy.

    The remedy is an estimate: the state shrinks with the number of devices that it is sharded over,
    the rest with the rows of a micro-batch on a device.
    """
    memory = found.memory
    available = memory.available or 0
    rest = max(memory.total - memory.state, 1)
    said = (
        f"it does not fit: {memory.total / GIB:.1f} GiB of {available / GIB:.2f} on each device, "
        f"{memory.state / GIB:.1f} of it parameters and optimizer state; "
    )
    if memory.state > available / 2:
        fsdp = found.mesh.get("fsdp", 1)
        more = 2 ** math.ceil(math.log2(memory.state / (available / 2)))
        others = math.prod(found.mesh.values()) // (fsdp * found.mesh.get("data", 1))
        of_rows = found.devices // others
        sizes = (n for n in range(fsdp * more, of_rows + 1) if of_rows % n == 0)
        if size := next(sizes, None):
            return said + f"shard them further, with --mesh.fsdp {size} --mesh.data -1"
        return said + f"use {more} times as many devices, and shard them over all with --mesh.fsdp"
    if found.remat == "none":
        return said + "rematerialize layers in the backward pass, with --compute.remat full"
    parts = math.ceil(rest / (available - memory.state))
    rows = found.batch_shape[0] // _batch_parts(found)
    fitting = next((n for n in range(parts, rows + 1) if rows % n == 0), None)
    if fitting is None:
        return said + "use more devices, with --mesh.context or --mesh.tensor to shard a sequence"
    return (
        said + f"use phases.*.micro_batches {fitting * found.micro_batches}, or "
        f"{rows // fitting} rows on each device instead of {rows}"
    )


def _batch_parts(found: StepPlan) -> int:
    """Number of devices with different rows, times micro-batches."""
    return found.micro_batches * math.prod(
        found.mesh.get(name, 1) for name in ("data", "fsdp", "expert")
    )
