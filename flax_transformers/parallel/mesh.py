"""The device mesh, and its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from flax_transformers import ranges
from flax_transformers.errors import UserError


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1, for all remaining devices."""

    data: int = -1
    """Data parallelism: replicas of the model, with gradients summed over them."""
    fsdp: int = 1
    """Data parallelism with sharded parameters and optimizer state (ZeRO-3)."""
    tensor: int = 1
    """Tensor parallelism over heads, feed-forward width and vocabulary (Megatron-LM)."""
    context: int = 1
    """Sequences divided by position, for long text; attention gathers keys and values."""
    expert: int = 1
    """Data parallelism with the experts of a mixture divided."""

    RANGES: ClassVar[ranges.Ranges] = dict.fromkeys(
        ("data", "fsdp", "tensor", "context", "expert"), ranges.integers(-1, 2**20)
    )

    def __post_init__(self) -> None:
        ranges.check_fields(self, "mesh")
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            raise ranges.OutOfRange(
                f"mesh {_shown(sizes)} is not valid; give every axis a positive size, or one of "
                "them -1"
            )


AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Names of the mesh axes, from the slowest interconnect to the fastest: adjacent devices differ
in the last."""


def resolve_mesh(config: MeshConfig, device_count: int) -> MeshConfig:
    """Replace -1 by the number of remaining devices.

    Raises UserError if the product of the axes is not the number of devices.
    """
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if device_count % fixed or (not free and fixed != device_count):
        raise UserError(
            f"mesh {_shown(sizes)} does not fit {device_count} device{'s' * (device_count != 1)}; "
            "set the axes so that their product is that number, or one of them to -1"
        )
    return replace(config, **{free[0]: device_count // fixed}) if free else config


def _shown(sizes: Mapping[str, int]) -> str:
    """The axes with more than one device."""
    used = {name: size for name, size in sizes.items() if size != 1} or {"data": 1}
    return " x ".join(f"{name}={size}" for name, size in used.items())


def make_mesh(
    config: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
) -> Mesh:
    """Make the mesh of ``config``, or with the given sizes of its axes, over ``devices``.

    ``devices`` are by default all devices of the job. One size may be -1, for all remaining ones.
    Raises UserError as `resolve_mesh` and `arrange` do.
    """
    devices = jax.devices() if devices is None else devices
    given = MeshConfig(data, fsdp, tensor, context, expert)
    if config is not None and given != MeshConfig():
        raise UserError("make_mesh takes a config or sizes of axes; leave out one of both")
    config = resolve_mesh(config or given, len(devices))
    grid = arrange(tuple(getattr(config, name) for name in AXES), devices)
    # Linen shards arrays by constraints, which need Auto axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange ``devices`` by their interconnect as an array of ``shape``, in the order of AXES.

    Between slices, which a slow network connects, only "data" is divided: a step then sends the sum
    of gradients over it. Raises UserError if the number of TPU slices does not divide "data". Other
    hosts have faster networks, over which any axis can be divided.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *rest = shape
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if data % slices == 0:
        within, across = (data // slices, *rest), (slices, *(1 for _ in rest))
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        raise UserError(
            f"mesh data={data} does not divide over {slices} slices, and no other axis can be "
            f"divided over them; set data to a multiple of {slices}, and the other axes so that "
            f"their product divides the {len(devices) // slices} devices of a slice"
        )
    return np.array(devices).reshape(shape)
