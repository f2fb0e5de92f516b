"""Which parameters a setting applies to: patterns, kinds, matrix axes, depths.

A name is the tuple of dict keys on the way to a parameter, as ``("stack", "layers", "block_0",
"mlp", "up", "kernel")``. Parameters below a ``block_`` are stacked: their leading axis runs over
layers. What a parameter is follows from its logical axes, in modules of anyone's, and never from
its values or its size.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from flax_transformers.errors import UserError

Name = tuple[str, ...]

_BATCH_AXES = frozenset({"layers", "expert"})
_TABLE_ROWS = frozenset({"vocab", "positions", "token_types"})
_HEAD_AXES = frozenset({"heads", "key_heads", "head_dim"})  # of a bias for each head
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


Axes = Mapping[Name, tuple[str | None, ...]]
"""Logical axis names of parameters, by the name of the parameter."""

NO_AXES: Axes = {}


def logical_axes(boxed: Any) -> Axes:
    """The logical axis names that parameters carry (``nn.with_logical_partitioning``).

    ``boxed`` is a tree as ``model.init`` returns it, of arrays or shapes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    return {
        name_of(path): tuple(leaf.names)
        for path, leaf in leaves
        if isinstance(leaf, nn.Partitioned)
    }


def kind_of(name: Name, axes: Axes = NO_AXES) -> str:
    """What a parameter is: "kernel", "embedding" (a table), "bias" or "scale".

    Flax's names "bias" and "scale" mean what they say. Otherwise the logical axes decide: a table
    has rows for a vocabulary or positions, a kernel has an input and an output, and all else is a
    vector. Parameters without axes are known by their own name, the last on their path, alone.
    """
    own = _own_axes(axes.get(name, ()))
    last = name[-1] if name else ""
    if last in ("bias", "scale") or not any(own):
        return last
    if len(own) > 1 and own[0] in _TABLE_ROWS:
        return "embedding"
    if len(own) > 1 and not set(own) <= _HEAD_AXES:
        return "kernel"
    if last in ("embedding", "kernel"):
        return last
    return "scale" if "norm" in own else "bias"


def _own_axes(names: Sequence[str | None]) -> tuple[str | None, ...]:
    """Without the leading axes of layers and experts."""
    return tuple(names[sum(1 for _ in itertools.takewhile(_BATCH_AXES.__contains__, names)) :])


@dataclass(frozen=True)
class MatrixAxes:
    """Axes of a parameter: those over separate parameters, and those of a matrix.

    ``rows`` is the matrix's input side; vectors have ``columns`` only.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        """All but the batch axes; for a matrix, those of one matrix."""
        return self.rows + self.columns


def matrix_axes(name: Name, rank: int, axes: Axes = NO_AXES) -> MatrixAxes:
    """How the axes of a parameter of ``rank`` axes form [input, output] matrices.

    Layers and experts are batch axes. Where a kernel's first own axis is "embed", it alone is the
    input, as of [D, N, H]; of every other kernel or table, all axes but the last are, as of
    [N, H, D] and of the patches' [C, P, P, D]. Biases, scales and single vectors are no matrices.
    """
    named = axes.get(name)
    start = rank - len(_own_axes(named)) if named else int(is_stacked(name))
    batch, own = tuple(range(start)), tuple(range(start, rank))
    if kind_of(name, axes) not in ("kernel", "embedding") or len(own) < 2:
        return MatrixAxes(batch, (), own)
    split = 1 if named and named[start] == "embed" else len(own) - 1
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
