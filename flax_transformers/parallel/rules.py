"""Rules from logical axes to mesh axes, and the shardings that follow from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_transformers.errors import UserError
from flax_transformers.parallel.partitioning import LANES

log = logging.getLogger(__name__)

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("batch", ("data", "fsdp", "expert")),
    ("length", "context"),
    ("features", None),
    # parameters and activations
    ("heads", "tensor"),
    ("key_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # parameters
    ("embed", "fsdp"),
    ("expert", "expert"),
    ("router", None),
    ("positions", None),
    ("fixed_positions", None),
    ("channels", None),
    ("patch_frames", None),
    ("patch_height", None),
    ("patch_width", None),
    ("token_types", None),
    ("norm", None),
    ("input_norm", None),
    ("running", None),
    ("labels", None),
    ("rank", None),
    ("layers", None),
)
_AXES = dict(RULES)


def mesh_axes(spec: PartitionSpec) -> PartitionSpec:
    """Mesh axes of logical axes. Raises KeyError for an axis without a rule."""
    unknown = [name for name in spec if name is not None and name not in _AXES]
    if unknown:
        raise KeyError(f"no sharding rule for logical axis {unknown[0]!r}; known: {sorted(_AXES)}")
    return PartitionSpec(*(None if name is None else _AXES[name] for name in spec))


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedSharding of each parameter of a tree with logical axes.

    ``boxed`` is ``jax.eval_shape(model.init, ...)["params"]``. Raises UserError if two axes of a
    parameter have the same mesh axis, or if a size does not divide over its mesh axis (key heads
    are not replicated). Logs a warning if shards of the model's width are narrower than ``LANES``
    on TPUs.
    """
    logical = nn.get_partition_spec(boxed)
    shapes = nn.meta.unbox(boxed)
    narrow: dict[str, int] = {}

    def shard(path: Any, shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        name = "/".join(str(key.key) for key in path)
        if not len(spec):  # a module of the user's without logical axes
            return NamedSharding(mesh, spec)
        if len(spec) != len(shape.shape):
            raise ValueError(f"parameter {name} {shape.shape} has logical axes {tuple(spec)}")
        axes = mesh_axes(spec)
        _check(name, shape.shape, spec, axes, mesh)
        width = _narrow_width(shape.shape, spec, axes, mesh)
        if width is not None:
            narrow.setdefault(name, width)
        return NamedSharding(mesh, axes)

    shardings = jax.tree_util.tree_map_with_path(shard, shapes, logical)
    if narrow:
        name, width = next(iter(narrow.items()))
        _warn_of_narrow(name, width, _AXES["embed"] or (), mesh)
    return shardings


def _check(
    name: str, shape: tuple[int, ...], logical: PartitionSpec, axes: PartitionSpec, mesh: Mesh
) -> None:
    used: dict[str, str] = {}
    for size, logical_name, axis in zip(shape, logical, axes, strict=True):
        if axis is None:
            continue
        for one in _names(axis):
            if one in used:
                raise UserError(
                    f"parameter {name} has both {used[one]!r} and {logical_name!r} on mesh axis "
                    f"{one!r}; give one of them another axis in the sharding rules"
                )
            used[one] = logical_name
        parts = _size(mesh, axis)
        if size % parts:
            fitting = [n for n in _divisors(size) if n <= mesh.size]
            raise UserError(
                f"parameter {name}: its {logical_name!r} axis of {size} does not divide over mesh "
                f"{_shown(mesh, axis)}; sizes that fit are {', '.join(map(str, fitting))}"
            )


def _narrow_width(
    shape: tuple[int, ...], logical: PartitionSpec, axes: PartitionSpec, mesh: Mesh
) -> int | None:
    """Width of the parameter if its shards on TPUs are narrower than ``LANES``."""
    if mesh.devices.flat[0].platform == "tpu":
        for size, logical_name, axis in zip(shape, logical, axes, strict=True):
            parts = 1 if axis is None else _size(mesh, axis)
            if logical_name == "embed" and parts > 1 and size // parts < LANES:
                return size
    return None


def _warn_of_narrow(name: str, width: int, axis: str | tuple[str, ...], mesh: Mesh) -> None:
    parts = _size(mesh, axis)
    keeping = max(n for n in _divisors(parts) if n == 1 or width // n >= LANES)
    log.warning(
        "parameter %s: its width of %d over mesh %s leaves %d per device, less than the %d lanes "
        "of a TPU, so that collectives transfer far more than necessary; shard it over %d devices "
        "at most, and the batch over %d times as many (--mesh.data)",
        name,
        width,
        _shown(mesh, axis),
        width // parts,
        LANES,
        keeping,
        parts // keeping,
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _shown(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> str:
    """As in "axis tensor=4", or "axes data=2 x fsdp=4" where several divide one dimension."""
    names = _names(axis)
    shown = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
    return f"ax{'i' if len(names) == 1 else 'e'}s {shown}"


def _size(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[one] for one in _names(axis))


def _names(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batches: divided by example, by the rule for "batch"."""
    return NamedSharding(mesh, PartitionSpec(_AXES["batch"]))


def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Indices of the examples of a global batch that this process loads, in increasing order.

    Processes that hold the same examples (over which a tensor axis is divided) load the same ones.
    """
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def place_rows(
    local: Mapping[str, np.ndarray], rows: np.ndarray, sharding: NamedSharding, batch_size: int
) -> dict[str, jax.Array]:
    """Sharded global batch [batch_size, ...] from the examples ``rows`` of this process."""

    def place(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),))[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return values[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

    return {name: place(values) for name, values in local.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(
    batch_size: int, micro_batches: int, mesh: Mesh | AbstractMesh, name: str = "batch_size"
) -> None:
    """Raise UserError unless every micro-batch divides evenly over the mesh."""
    axis = _AXES["batch"] or ()
    parts = _size(mesh, axis) * micro_batches
    if batch_size % parts:
        lower = batch_size // parts * parts
        near = f"{lower} or {lower + parts}" if lower else f"{parts}"
        shape = " x ".join(f"{n}={mesh.shape[n]}" for n in _names(axis) if mesh.shape[n] > 1)
        raise UserError(
            f"{name} {batch_size} does not divide over mesh {shape or 'of one device'} and "
            f"micro_batches={micro_batches} ({parts} parts); use a multiple of {parts}, such as "
            f"{near}"
        )


def check_sequence_length(sequence_length: int | None, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError unless the positions of a sequence divide evenly over the mesh.

    The length is None for images.
    """
    axis = _AXES["length"] or ()
    parts = _size(mesh, axis)
    if parts == 1:
        return
    if sequence_length is None:
        raise UserError(
            f"mesh {_shown(mesh, axis)} divides the positions of text, which images do not have; "
            "set it to 1, and divide the batch or the parameters"
        )
    if sequence_length % parts:
        near = max(sequence_length // parts * parts, parts)
        raise UserError(
            f"sequence_length {sequence_length} does not divide over mesh {_shown(mesh, axis)}; "
            f"use a multiple of {parts}, such as {near}"
        )
