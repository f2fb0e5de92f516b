"""Which mesh, recomputation and micro-batches suit a run: the likeliest are compiled and ranked.

The run stays the run: its batch and its mathematics do not change, only how they are divided. What
is worth compiling is guessed first, from the sizes of the model alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax

from flax_transformers.errors import UserError
from flax_transformers.models.config import TransformerConfig, VisionConfig
from flax_transformers.models.layers.patches import patch_grid
from flax_transformers.parallel.device_specs import DeviceSpec, device_spec
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.planning.plan import GIB, Plan, bytes_on_device, plan
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.setup import make_trainer, phase_flops

LANES = 128
"""Width of a TPU's tiles: shards that are narrower travel padded."""
_SLACK = 1.5  # the guess of memory is no better than this,
_NEIGHBOURS = 2  # so that this many numbers of micro-batches are kept, from the fewest that may fit

Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class Candidate:
    """One way to divide a run, and a guess of what it costs a device."""

    config: TrainConfig
    phase: AnyPhase
    memory: float
    """Bytes."""
    seconds: float
    """Of a step."""


def search(
    config: TrainConfig,
    phase: AnyPhase,
    devices: Sequence[jax.Device],
    topology: str,
    *,
    limit: int,
    on_plan: Callable[[Plan], None] = lambda found: None,
) -> list[Plan]:
    """Plans of the ``limit`` likeliest candidates: those that fit come first, the fastest at the
    top. ``on_plan`` sees each as soon as it is compiled.

    Raises UserError for devices that are not in the table of chips, and where no mesh fits.
    """
    chip = device_spec(devices[0].device_kind)
    if chip is None:
        raise UserError(
            f"nothing is known of the speed of {devices[0].device_kind!r}; search for a TPU or GPU"
        )
    found: list[Plan] = []
    refused = None
    for one in candidates(config, phase, devices, chip):
        if len(found) == limit:
            break
        try:
            found.append(plan(one.config, one.phase, devices, topology))
        except UserError as error:  # a dimension that the mesh does not divide
            refused = error
            continue
        on_plan(found[-1])
    if not found:
        raise refused or UserError(
            f"by estimate no mesh of {len(devices)} devices of {chip.memory_gib} GiB holds this "
            "run; use more of them, or a smaller batch"
        )
    return sorted(found, key=_rank)


def _rank(found: Plan) -> tuple[bool, float]:
    seconds = math.inf if found.roofline is None else found.roofline.step
    return not found.fits, seconds


def candidates(
    config: TrainConfig, phase: AnyPhase, devices: Sequence[jax.Device], chip: DeviceSpec
) -> list[Candidate]:
    """What may divide and may fit, the fastest by guess first."""
    whole = make_trainer(config, make_mesh(MeshConfig(), devices)).abstract
    held = bytes_on_device(whole.params), bytes_on_device((whole.opt_state, whole.ema))
    flops = phase_flops(config, phase) / len(devices)
    found: list[Candidate] = []
    for mesh in _meshes(config.model, len(devices)):
        parts = mesh.data * mesh.fsdp * mesh.expert
        if phase.batch_size % parts:
            continue
        for remat in get_args(Remat):
            guesses = (
                _guess(config, replace(phase, micro_batches=number), mesh, remat, held, flops, chip)
                for number in _divisors(phase.batch_size // parts)
            )
            likely = (one for one in guesses if one.memory < _SLACK * chip.memory_gib * GIB)
            found += itertools.islice(likely, _NEIGHBOURS)
    return sorted(found, key=lambda one: one.seconds)


def _meshes(model: TransformerConfig, devices: int) -> Iterator[MeshConfig]:
    """Powers of two for all axes but the first, which takes what is left."""
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
    """Into how many micro-batches the rows of a device may be divided, doubling."""
    return [parts for parts in _powers(rows) if rows % parts == 0]


def _guess(
    config: TrainConfig,
    phase: AnyPhase,
    mesh: MeshConfig,
    remat: Remat,
    held: tuple[int, int],
    flops: float,
    chip: DeviceSpec,
) -> Candidate:
    """Memory and time from sizes alone: ``held`` bytes of parameters and optimizer in all, and
    FLOPs of one device.

    Gradients take as much as parameters. Parameters are gathered, two bytes each, twice for every
    micro-batch, and gradients scattered as often; narrow shards cost double. Copies of the model
    reduce gradients once, and tensor parallelism adds four all-reduces of activations a layer.
    """
    model, divided = config.model, mesh.fsdp * mesh.tensor * mesh.expert
    parameters, optimizer = (size / divided for size in held)
    rows = phase.batch_size // (mesh.data * mesh.fsdp * mesh.expert * phase.micro_batches)
    tokens = rows * _places(model, phase)
    memory = 2 * parameters + optimizer + _activation_bytes(model, phase, remat, tokens, mesh)
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
    model: TransformerConfig, phase: AnyPhase, remat: Remat, tokens: int, mesh: MeshConfig
) -> float:
    """Kept for the backward pass, in 16 bits (arXiv:2205.05198 §4: 34 bytes a unit of width, and 5
    a score); the rest of what a step needs is left out."""
    width, heads = model.hidden_size, model.num_heads
    layer = tokens * (10 * width + (24 * width + 5 * heads * _places(model, phase)) / mesh.tensor)
    projections = 2 * tokens * (5 * width + 2 * model.intermediate_size) / mesh.tensor
    kept = {"none": layer, "dots": projections + 2 * tokens * width, "full": 2 * tokens * width}
    return model.num_layers * kept[remat] + layer


def _places(model: TransformerConfig, phase: AnyPhase) -> int:
    """Tokens, or patches, of a row."""
    if isinstance(model, VisionConfig):
        return math.prod(patch_grid((phase.sequence_length,) * 2, model.patch_size))
    return phase.sequence_length
