"""Kernels on each device's part of their operands, under the current mesh.

The partitioner cannot divide a kernel that is not an XLA operation: it runs on each device's part,
given by the logical axes of its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.parallel.partitioning import LANES, mesh_axes_of, parts

Axes = tuple[str | None, ...] | PartitionSpec
"""Logical names of an array's axes, or the mesh's own."""

ATTENDED = "attended"
"""Checkpoint name of a kernel's result and residuals."""


def on_each_device(
    local: Callable[..., Any], operands: tuple[Any, ...], axes: tuple[Any, ...], out: Any
) -> Any:
    """``local(*operands)``, on each device with its own parts of them.

    ``axes`` has the axes of each operand, a prefix of its tree, and ``out`` those of the result.
    Along an axis that is None an operand is replicated, and its gradient is summed over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*operands)
    specs = tuple(jax.tree.map(_spec, one, is_leaf=_is_axes) for one in axes)
    result = jax.tree.map(_spec, out, is_leaf=_is_axes)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(
        *operands
    )


def _is_axes(node: Any) -> bool:
    return isinstance(node, PartitionSpec) or (
        isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)
    )


def _spec(axes: Axes) -> PartitionSpec:
    if isinstance(axes, PartitionSpec):
        return axes
    return PartitionSpec(*(None if name is None else mesh_axes_of(name) or None for name in axes))


def gathering(local: Callable[..., Any]) -> Callable[..., Any]:
    """``local``, which gathers keys and values over the mesh, with only their parts kept for the
    backward pass, which gathers them again."""
    if parts("length") == 1:
        return local
    return jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))


def gathered(x_BSKH: jax.Array) -> jax.Array:
    """All positions of this device's sequences and heads (all-gather; the gradient is
    reduce-scattered)."""
    axes = mesh_axes_of("length")
    return jax.lax.all_gather(x_BSKH, axes, axis=1, tiled=True) if axes else x_BSKH


def part_index(name: str) -> Any:
    """Which part of the logical axis ``name`` this device has, an int32 scalar."""
    axes = mesh_axes_of(name)
    return jax.lax.axis_index(axes) if axes else 0


def on_cpu() -> bool:
    """Whether the traced program is for a CPU, where TPU kernels run interpreted (in tests).

    Programs for TPUs may be compiled on machines without any: the mesh decides.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.default_backend() if device is None else device.device_kind
    return bool(kind == "cpu")


SEGMENTS = (("batch", "length"), ("batch", None))
"""Axes of the segments of queries and of keys."""


def padded_to_lanes(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Operands padded so that each device's part is a multiple of LANES long, and their segments.

    Padding attends to padding. The segments are None if there is no padding and one segment.
    """
    step = LANES * parts("length")

    def fill(x: jax.Array, value: int = 0) -> jax.Array:
        filler = [(0, 0), (0, -x.shape[1] % step)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, filler, constant_values=value)

    queries, keys = q_BTNH.shape[:2], k_BSKH.shape[:2]
    of_queries, of_keys = mask.query_segments, mask.key_segments
    if of_queries is None or of_keys is None:
        if not (queries[1] % step or keys[1] % step):
            return q_BTNH, k_BSKH, v_BSKH, None
        of_queries, of_keys = jnp.ones(queries, jnp.int32), jnp.ones(keys, jnp.int32)
    segments = (fill(of_queries.astype(jnp.int32), -1), fill(of_keys.astype(jnp.int32), -1))
    return fill(q_BTNH), fill(k_BSKH), fill(v_BSKH), segments


def block_size(length: int, largest: int) -> int:
    """The largest block that divides ``length``, which is a multiple of LANES."""
    return max(size for size in range(LANES, largest + 1, LANES) if length % size == 0)
