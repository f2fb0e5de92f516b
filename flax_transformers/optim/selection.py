"""What is read off a parameter's name: whether a pattern means it, its matrix axes, its depth.

A name is the tuple of dict keys on the way to a parameter, as ``("stack", "layers", "block_0",
"mlp", "up", "kernel")``. Parameters below a ``block_`` are stacked: their leading axis runs over
layers. Nothing here looks at a parameter's values, and its size decides nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
import optax

from flax_transformers.errors import UserError

Name = tuple[str, ...]

_FROM_HIDDEN = ("query", "key", "value")  # kernels [D, N, H]: the first axis is the input
_FEED_FORWARD = ("up", "gate", "down")  # with three axes: one matrix for each expert
_STACK_PARTS = ("first", "layers", "remainder")
_EMBEDDINGS = ("words", "embeddings")
_IN_FIRST_LAYER = "relative_bias"


def name_of(path: Iterable[Any]) -> Name:
    """The dict keys on a pytree path; boxes and tuples around them do not count."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` for a function that gets the parameter's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(name_of(path), *leaves), tree, *rest
    )


def is_stacked(name: Name) -> bool:
    """Whether the leading axis of a parameter runs over layers."""
    return any(key.startswith("block_") for key in name)


def matches(name: Name, pattern: str) -> bool:
    """Whether ``pattern`` means the parameter or a folder it lies in.

    ``*`` stands for anything, slashes included: "words", "*/attention", "*_head" and "*/bias".
    """
    return any(fnmatchcase("/".join(name[: k + 1]), pattern) for k in range(len(name)))


def check_patterns(params: Any, patterns: Sequence[str], field: str) -> None:
    """Raises UserError for a pattern that means no parameter; ``field`` says where it stands."""
    names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            known = ["/".join(name) for name in names]
            folders = sorted({"/".join(name[:k]) for name in names for k in (1, 2)} | set(known))
            near = difflib.get_close_matches(pattern, folders, 1, 0.4) or [known[0]]
            raise UserError(
                f"optimizer.{field}: {pattern!r} matches no parameter of the model; did you mean "
                f"{near[0]!r}?"
            )


def partition(params: Any, frozen: Sequence[str]) -> tuple[Any, Any]:
    """The trained and the frozen part of ``params``: two trees like it.

    Each has an ``optax.MaskedNode`` in place of every parameter of the other part. ``frozen`` are
    patterns as for ``matches``.
    """

    def select(keep_frozen: bool) -> Any:
        def keep(name: Name, leaf: Any) -> Any:
            is_frozen = any(matches(name, pattern) for pattern in frozen)
            return leaf if is_frozen == keep_frozen else optax.MaskedNode()

        return map_named(keep, params)

    return select(False), select(True)


def merge(part: Any, whole: Any) -> Any:
    """One part of ``partition``, with the leaves of ``whole`` where it is empty."""
    return jax.tree.map(
        lambda leaf, own: leaf if isinstance(own, optax.MaskedNode) else own, whole, part
    )


@dataclass(frozen=True)
class MatrixAxes:
    """Axes of a parameter: those that number whole parameters, and those of a matrix.

    ``rows`` is the matrix's input side; both sides are empty for what is no matrix.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        """All but the batch axes; for a matrix, those of one matrix."""
        return self.rows + self.columns


def matrix_axes(name: Name, rank: int) -> MatrixAxes:
    """How the axes of a parameter of ``rank`` axes form [input, output] matrices.

    Layers and experts are batch axes. Of the kernels [D, N, H] of query, key and value, D is the
    input; of every other kernel or table, all axes but the last are, as of [N, H, D] and of the
    patches' [C, P, P, D]. Biases, scales and single vectors are no matrices, and neither is
    anything whose last name is new.
    """
    start = 1 if is_stacked(name) else 0
    parent = name[-2] if len(name) > 1 else ""
    if parent in _FEED_FORWARD and name[-1] == "kernel" and rank - start == 3:
        start += 1
    batch, own = tuple(range(start)), tuple(range(start, rank))
    if name[-1] not in ("kernel", "embedding") or len(own) < 2:
        return MatrixAxes(batch, (), own)
    split = 1 if parent in _FROM_HIDDEN else len(own) - 1
    return MatrixAxes(batch, own[:split], own[split:])


def depths(params: Any) -> tuple[Any, int]:
    """A tree like ``params`` of depths, and the depth of the heads.

    Embeddings have depth 0, layer i (from 0) i + 1, and what follows the last layer (its norm, the
    heads) the number of layers + 1, as in BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377). A
    stacked parameter's depth is a vector over its leading axis. Where there are two stacks, the
    decoder's layers lie on the encoder's; T5's relative bias belongs to the first layer of its
    stack, and the encoder's last norm to its last layer.
    """
    shapes = {
        name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    stacks = _stacks(shapes)
    head = sum(layers for layers, _ in stacks.values()) + 1
    offsets = dict(zip(stacks, np.cumsum([0, *(n for n, _ in stacks.values())]), strict=False))

    def depth(name: Name, _: Any) -> np.ndarray:
        if is_stacked(name):
            place = next(k for k, key in enumerate(name) if key.startswith("block_"))
            _, rows = stacks[name[: place - 1]]
            return offsets[name[: place - 1]] + 1 + rows[name[place - 1 : place + 1]]
        if any(key in _EMBEDDINGS for key in name):
            return np.asarray(0)
        below = [stack for stack in stacks if stack[:-1] and name[: len(stack) - 1] == stack[:-1]]
        if below and _IN_FIRST_LAYER in name:
            return np.asarray(offsets[below[0]] + 1)
        if below and below[0] != list(stacks)[-1]:
            return np.asarray(offsets[below[0]] + stacks[below[0]][0])
        return np.asarray(head)

    return map_named(depth, params), head


def _stacks(shapes: dict[Name, tuple[int, ...]]) -> dict[Name, tuple[int, dict[Name, np.ndarray]]]:
    """By the name of each stack, decoders last: its layers, and which of them each block has."""
    repeats: dict[Name, dict[Name, int]] = {}
    for name, shape in shapes.items():
        for k, key in enumerate(name):
            if key.startswith("block_"):
                repeats.setdefault(name[: k - 1], {})[name[k - 1 : k + 1]] = shape[0]
    found: dict[Name, tuple[int, dict[Name, np.ndarray]]] = {}
    for stack in sorted(repeats, key=lambda name: ("decoder" in name, name)):
        rows: dict[Name, np.ndarray] = {}
        start = 0
        for part in _STACK_PARTS:
            blocks = [block for block in repeats[stack] if block[0] == part]
            for block in blocks:
                count = repeats[stack][block]
                position = int(block[1].removeprefix("block_"))
                rows[block] = start + position + len(blocks) * np.arange(count)
            start += sum(repeats[stack][block] for block in blocks)
        found[stack] = start, rows
    return found
