"""Search for the mesh, rematerialization and gradient accumulation of a run.

The batch and the mathematics of the run do not change. The best candidates of an estimate from the
sizes of the model are compiled and ranked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax

from flax_transformers.errors import UserError
from flax_transformers.models.config import TransformerConfig
from flax_transformers.monitoring.device_specs import DeviceSpec, device_spec
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.partitioning import LANES
from flax_transformers.planning.plan import GIB, StepPlan, bytes_on_device, plan
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.setup import make_trainer, phase_flops

_SLACK = 1.5  # error of the memory estimate
_NEIGHBOURS = 2  # candidates for the number of micro-batches, from the smallest that may fit

Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class Candidate:
    """One way to shard a run, with an estimate of its cost."""

    config: TrainConfig
    phase: AnyPhase
    memory: float
    """Bytes on a device."""
    seconds: float
    """Time of a step."""


def search(
    config: TrainConfig,
    phase: AnyPhase,
    devices: Sequence[jax.Device],
    topology: str,
    *,
    limit: int,
    on_plan: Callable[[StepPlan], None] = lambda found: None,
    teacher: TransformerConfig | None = None,
) -> list[StepPlan]:
    """Plans of the ``limit`` best candidates, sorted: those that fit first, then by time.
    ``on_plan`` is called with each after it is compiled.

    Raises UserError for devices without a device spec, and if no mesh fits.
    """
    chip = device_spec(devices[0].device_kind)
    if chip is None:
        raise UserError(
            f"the speed of {devices[0].device_kind!r} is unknown; search for a TPU or GPU"
        )
    found: list[StepPlan] = []
    refused = None
    for one in candidates(config, phase, devices, chip):
        if len(found) == limit:
            break
        try:
            found.append(plan(one.config, one.phase, devices, topology, teacher=teacher))
        except UserError as error:  # a dimension, or another batch, that the mesh does not divide
            refused = error
            continue
        on_plan(found[-1])
    if not found:
        raise refused or UserError(
            f"by estimate this run fits on no mesh of {len(devices)} devices with "
            f"{chip.available_bytes / GIB:.2f} GiB; use more devices, or a smaller batch"
        )
    return sorted(found, key=_rank)


def _rank(found: StepPlan) -> tuple[bool, float]:
    seconds = math.inf if found.roofline is None else found.roofline.step
    return not found.fits, seconds


def candidates(
    config: TrainConfig, phase: AnyPhase, devices: Sequence[jax.Device], chip: DeviceSpec
) -> list[Candidate]:
    """Candidates that the mesh divides and that may fit, fastest by estimate first."""
    whole = make_trainer(config, make_mesh(MeshConfig(), devices)).abstract
    held = bytes_on_device(whole.variables), bytes_on_device((whole.opt_state, whole.ema))
    flops = phase_flops(config, phase) / len(devices)
    found: list[Candidate] = []
    for mesh in _meshes(config.model, len(devices)):
        parts = mesh.data * mesh.fsdp * mesh.expert
        if phase.batch_size % parts:
            continue
        for remat in get_args(Remat):
            estimates = (
                _estimate(*_split(config, phase, number), mesh, remat, held, flops, chip)
                for number in _divisors(phase.batch_size // parts)
            )
            likely = (one for one in estimates if one.memory < _SLACK * chip.available_bytes)
            found += itertools.islice(likely, _NEIGHBOURS)
    return sorted(found, key=lambda one: one.seconds)


def _split(config: TrainConfig, phase: AnyPhase, number: int) -> tuple[TrainConfig, AnyPhase]:
    """The config with ``number`` micro-batches in ``phase``, and this phase."""
    new = replace(phase, micro_batches=number)
    return replace(config, phases=tuple(new if p is phase else p for p in config.phases)), new


def _meshes(model: TransformerConfig, devices: int) -> Iterator[MeshConfig]:
    """Meshes with powers of two for all axes but ``data``, which takes the remaining devices."""
    experts = getattr(model, "experts", 1)
    for tensor, expert in itertools.product(_powers(8), _powers(experts)):
        if model.kv_heads % tensor or experts % expert or devices % (tensor * expert):
            continue
        rest = devices // (tensor * expert)
        for fsdp in _powers(rest):
            if rest % fsdp == 0:
                yield MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor, expert=expert)


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def _divisors(rows: int) -> list[int]:
    """Powers of two that divide the rows of a device."""
    return [parts for parts in _powers(rows) if rows % parts == 0]


def _estimate(
    config: TrainConfig,
    phase: AnyPhase,
    mesh: MeshConfig,
    remat: Remat,
    held: tuple[int, int],
    flops: float,
    chip: DeviceSpec,
) -> Candidate:
    """Estimate memory and time from ``held``, the total bytes of parameters and optimizer state,
    and from the FLOPs of one device.

    Gradients take as much memory as parameters. Parameters are gathered, two bytes each, twice in
    every micro-batch, and gradients scattered once; narrow shards cost double. Data parallelism
    reduces gradients once, and tensor parallelism adds four all-reduces of activations per layer.
    """
    model, divided = config.model, mesh.fsdp * mesh.tensor * mesh.expert
    parameters, optimizer = (size / divided for size in held)
    rows = phase.batch_size // (mesh.data * mesh.fsdp * mesh.expert * phase.micro_batches)
    length = tokens_of_row(config, phase)
    tokens = rows * length
    memory = 2 * parameters + optimizer + _activation_bytes(model, remat, tokens, length, mesh)
    narrow = 2 if model.hidden_size // mesh.fsdp < LANES else 1
    interconnect = parameters / 2 * (mesh.fsdp - 1) * 3 * phase.micro_batches * narrow
    interconnect += parameters * (mesh.data - 1) / mesh.data
    activations = 2 * tokens * phase.micro_batches * model.hidden_size
    interconnect += 8 * model.num_layers * activations * (mesh.tensor - 1) / mesh.tensor
    busy = flops * {"none": 1.0, "dots": 1.05, "full": 4 / 3}[remat] / chip.peak_flops
    return Candidate(
        config=replace(config, mesh=mesh, compute=replace(config.compute, remat=remat)),
        phase=phase,
        memory=memory,
        # Of two with the same compute time, the one that communicates less comes first.
        seconds=max(busy, interconnect / chip.ring_bandwidth)
        + 0.1 * interconnect / chip.ring_bandwidth,
    )


def _activation_bytes(
    model: TransformerConfig, remat: Remat, tokens: int, length: int, mesh: MeshConfig
) -> float:
    """Bytes of activations for the backward pass, in 16 bits, of ``tokens`` in rows of ``length``
    (arXiv:2205.05198 §4: 34 bytes per unit of width and 5 per attention score)."""
    width, heads = model.hidden_size, model.num_heads
    layer = tokens * (10 * width + (24 * width + 5 * heads * length) / mesh.tensor)
    projections = 2 * tokens * (5 * width + 2 * model.intermediate_size) / mesh.tensor
    kept = {"none": layer, "dots": projections + 2 * tokens * width, "full": 2 * tokens * width}
    return model.num_layers * kept[remat] + layer


def tokens_of_row(config: TrainConfig, phase: AnyPhase) -> int:
    """Number of tokens of a row, of an image those of its largest attention."""
    modalities = getattr(config.objective, "modalities", ())
    groups = config.model.row_flops(phase.sequence_length, modalities)
    if groups is None:
        return phase.sequence_length
    return max(one.tokens for one in groups if one.attention)
