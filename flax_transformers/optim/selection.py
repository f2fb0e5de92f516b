"""Which parameters a setting applies to: patterns, kinds, matrix axes, depths.

A name is the tuple of dict keys on the way to a parameter, as ``("stack", "layers", "block_0",
"mlp", "up", "kernel")``. What a parameter is, and which layer it belongs to, follows from its
logical axes, in modules of anyone's, and never from its values or its size. Trees without logical
axes are read by the names that the modules of this package use.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.errors import UserError

Name = tuple[str, ...]

_BATCH_AXES = frozenset({"layers", "expert"})
_TABLE_ROWS = frozenset({"vocab", "positions", "fixed_positions", "token_types"})
_HEAD_AXES = frozenset({"heads", "key_heads", "head_dim"})  # of a bias for each head
_STACK_PARTS = ("first", "layers", "remainder")
_EMBEDDINGS = ("words", "embeddings")
"""Folders of what the layers read."""
_RELATIVE_BIAS = "relative_bias"


def name_of(path: Iterable[Any]) -> Name:
    """The dict keys on a pytree path; boxes and tuples around them do not count."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` for a function that gets the parameter's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(name_of(path), *leaves), tree, *rest
    )


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


def split_statistics(boxed: Any) -> tuple[Any, Any]:
    """What optimizers train of a model's parameters, and its running statistics or None.

    These have the logical axis "running", as the mean and the variance of a batch norm.
    """
    running = {name for name, named in logical_axes(boxed).items() if "running" in named}
    if not running:
        return boxed, None
    leaves = flatten_dict(boxed, keep_empty_nodes=True)
    statistics = {name: leaves.pop(name) for name in running}
    return unflatten_dict(leaves), unflatten_dict(statistics)


def joined(params: Any, model_state: Any) -> Any:
    """The inverse of ``split_statistics``: one tree, as the model reads it."""
    if model_state is None:
        return params
    leaves = flatten_dict(params, keep_empty_nodes=True)
    return unflatten_dict(leaves | flatten_dict(model_state))


def leaves_named_in(other: Any, tree: Any) -> Any:
    """The leaves of ``tree`` whose names ``other`` has too, as a tree."""
    leaves = flatten_dict(tree)
    return unflatten_dict({name: leaves[name] for name in flatten_dict(other)})


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
    return {name_of(path): tuple(x.names) for path, x in leaves if isinstance(x, nn.Partitioned)}


def kind_of(name: Name, axes: Axes = NO_AXES) -> str:
    """What a parameter is: "kernel", "embedding" (a table), "fixed" (an untrained one), "bias" or
    "scale".

    Flax's names "bias" and "scale" mean what they say. Otherwise the logical axes decide: a table
    has rows for a vocabulary or positions, a kernel has an input and an output, and all else is a
    vector. Parameters without axes are known by their own name, the last on their path, alone.
    """
    own = _own_axes(axes.get(name, ()))
    last = name[-1] if name else ""
    if last in ("bias", "scale") or not any(own):
        return last
    if len(own) > 1 and own[0] in _TABLE_ROWS:
        return "fixed" if own[0] == "fixed_positions" else "embedding"
    if len(own) > 1 and not set(own) <= _HEAD_AXES:
        return "kernel"
    if last in ("embedding", "kernel"):
        return last
    return "scale" if "norm" in own else "bias"


def check_kinds(params: Any, kinds: Sequence[str], field: str, axes: Axes = NO_AXES) -> None:
    """Raises UserError for a name that no parameter has as its kind, besides those of `kind_of`."""
    names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = {"kernel", "embedding", "bias", "scale", *(kind_of(name, axes) for name in names)}
    for kind in kinds:
        if kind not in known:
            raise UserError(
                f"optimizer.{field}: {kind!r} is no kind of parameter; the kinds are "
                f"{', '.join(sorted(known))}"
            )


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

    Layers and experts are batch axes. Where a kernel's first own axis is "embed", or the "rank" of
    an adapter, it alone is the input, as of [D, N, H]; of every other kernel or table, all axes but
    the last are, as of [N, H, D] and of the patches' [C, P, P, D]. Biases, scales and single
    vectors are no matrices.
    """
    named = axes.get(name)
    start = rank - len(_own_axes(named)) if named else int(_is_stacked(name, axes))
    batch, own = tuple(range(start)), tuple(range(start, rank))
    if kind_of(name, axes) not in ("kernel", "embedding", "fixed") or len(own) < 2:
        return MatrixAxes(batch, (), own)
    split = 1 if named and named[start] in ("embed", "rank") else len(own) - 1
    return MatrixAxes(batch, own[:split], own[split:])


@dataclass(frozen=True)
class LayerStack:
    """Layers that are applied in turn, and the parameters that are stacked over them."""

    num_layers: int
    rows: Mapping[Name, np.ndarray]
    """By the name of a parameter: the layers, from 0, of the entries of its leading axis."""
    key_kernels: float
    """Kernels of attention keys and values in a layer; with cross-attention there are twice as
    many."""


def layer_stacks(
    shapes: Mapping[Name, tuple[int, ...]], axes: Axes = NO_AXES
) -> dict[Name, LayerStack]:
    """The stacks of layers among parameters of ``shapes``, by their common path.

    In order: decoders (``_decoders``) after the others, and by name, as of the stages of a CNN.
    """
    others = {name[:k] for name in shapes if not _is_stacked(name, axes) for k in range(len(name))}
    members: dict[Name, list[Name]] = {}
    for name in shapes:
        if _is_stacked(name, axes):
            members.setdefault(_stack_of(name, others), []).append(name)
    found = {
        stack: _stack(names, {name: shapes[name][0] for name in names}, axes)
        for stack, names in members.items()
    }
    decoders = _decoders(found)
    return {path: found[path] for path in sorted(found, key=lambda path: (path in decoders, path))}


def _decoders(stacks: Mapping[Name, LayerStack]) -> set[Name]:
    """The stacks that lie on others: those with cross-attention, and those in a folder "decoder*"
    or "*_head", as the decoders of masked autoencoders."""
    own = min((stack.key_kernels for stack in stacks.values() if stack.key_kernels), default=0)
    return {
        path
        for path, stack in stacks.items()
        if stack.key_kernels >= 2 * own > 0
        or any(key.startswith("decoder") or key.endswith("_head") for key in path)
    }


def _is_stacked(name: Name, axes: Axes) -> bool:
    """Whether the leading axis of a parameter runs over layers."""
    named = axes.get(name)
    return named[:1] == ("layers",) if named else _block_at(name) is not None


def _block_at(name: Name) -> int | None:
    """Where on its path a parameter of this package's ``Stack`` has the name of its block."""
    return next((k for k, key in enumerate(name) if key.startswith("block_")), None)


def _stack_of(name: Name, others: Collection[Name]) -> Name:
    """The path of a stack: the highest folder in which every parameter is stacked."""
    block = _block_at(name)
    if block is not None:
        return name[: block - 1]
    return next(name[:k] for k in range(len(name) + 1) if name[:k] not in others)


def _stack(names: Sequence[Name], counts: Mapping[Name, int], axes: Axes) -> LayerStack:
    """``counts``: the length of each parameter's leading axis."""
    blocks: dict[tuple[str, ...], int] = {}  # (part, block) to its number of layers
    block_of: dict[Name, tuple[str, ...]] = {}
    for name in names:
        at = _block_at(name)
        block_of[name] = () if at is None else name[at - 1 : at + 1]
        blocks[block_of[name]] = max(counts[name], blocks.get(block_of[name], 0))
    start = blocks.get((), 0)
    rows: dict[tuple[str, ...], np.ndarray] = {(): np.arange(start)}
    for part in _STACK_PARTS:
        pattern = [block for block in blocks if block and block[0] == part]
        for block in pattern:
            position = int(block[1].removeprefix("block_"))
            rows[block] = start + position + len(pattern) * np.arange(blocks[block])
        start += sum(blocks[block] for block in pattern)
    keys = sum(counts[name] for name in names if _makes_keys(name, axes))
    return LayerStack(start, {n: rows[block_of[n]][: counts[n]] for n in names}, keys / start)


def _makes_keys(name: Name, axes: Axes) -> bool:
    """Whether a kernel makes the keys or the values of attention."""
    return "key_heads" in axes.get(name, ()) and kind_of(name, axes) == "kernel"


def depths(params: Any, axes: Axes = NO_AXES) -> tuple[Any, int]:
    """A tree like ``params`` of depths, and the depth of the heads.

    Embeddings have depth 0, layer i (from 0) i + 1, and what follows the last layer (its norm, the
    heads) the number of layers + 1, as in BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377). A
    stacked parameter's depth is a vector over its leading axis.

    Stacks in one folder, as the stages of a CNN, follow each other by name. Stacks in different
    folders are towers that all end below the heads, so that each one's last layer has depth head
    - 1: the image and the text encoder of CLIP, ELECTRA's generator and discriminator. Decoders
    lie on the others, which end below the decoders' first layer: they have cross-attention, or lie
    in a folder "decoder*" or "*_head", as those of masked autoencoders.

    In the folder of a tower, T5's relative bias belongs to the first layer, and an encoder's last
    norm to its last layer; embeddings have the depth below the first layer, and 0 in a decoder.
    Embeddings are all parameters in a folder with a table of tokens, positions or token types, a
    kernel of patches, or a norm of the axis "input_norm", or of that name.
    """
    shapes = {
        name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    stacks = layer_stacks(shapes, axes)
    decoders, (first, head) = _decoders(stacks), _first_layers(stacks)
    folders = {name: _folder(name, stacks) for name in shapes}
    embeddings = {folders[name] for name in shapes if _is_input(name, axes)}
    embeddings |= {folder for folder in folders.values() if folder[-1] in _EMBEDDINGS}

    def depth(name: Name, _: Any) -> np.ndarray:
        for path, stack in stacks.items():
            if name in stack.rows:
                return first[path] + stack.rows[name]
        beside = [path for path in stacks if path[:-1] and name[: len(path) - 1] == path[:-1]]
        if folders[name] in embeddings:
            is_tower = beside and beside[0] not in decoders
            return np.asarray(first[beside[0]] - 1 if is_tower else 0)
        if beside and _is_relative_bias(name, axes):
            return np.asarray(first[beside[0]])
        end = first[beside[-1]] + stacks[beside[-1]].num_layers if beside else head
        return np.asarray(head if end == head else end - 1)

    return map_named(depth, params), head


def _first_layers(stacks: Mapping[Name, LayerStack]) -> tuple[dict[Name, int], int]:
    """The depth of the first layer of each stack, and that of the heads; see ``depths``."""
    decoders = _decoders(stacks)
    towers = {path: (path in decoders, path[:-1]) for path in stacks}
    heights: Counter[tuple[bool, Name]] = Counter()
    below: dict[Name, int] = {}  # layers of the same tower
    for path, stack in stacks.items():
        below[path] = heights[towers[path]]
        heights[towers[path]] += stack.num_layers
    middle = 1 + max((heights[tower] for tower in heights if not tower[0]), default=0)
    head = middle + max((heights[tower] for tower in heights if tower[0]), default=0)
    ends = {path: head if path in decoders else middle for path in stacks}
    return {path: ends[path] - heights[towers[path]] + below[path] for path in stacks}, head


def _folder(name: Name, stacks: Iterable[Name]) -> Name:
    """The highest folder on the path of a parameter that holds no stack."""
    holding = {stack[:k] for stack in stacks for k in range(len(stack))}
    return next((name[:k] for k in range(1, len(name)) if name[:k] not in holding), name)


def _is_input(name: Name, axes: Axes) -> bool:
    """Whether a parameter makes or norms vectors of tokens, positions or patches, by its logical
    axes."""
    own = _own_axes(axes.get(name, ()))
    is_table = len(own) > 1 and own[0] in _TABLE_ROWS and not _is_relative_bias(name, axes)
    return is_table or own == ("input_norm",) or (len(own) > 1 and own[0] == "channels")


def _is_relative_bias(name: Name, axes: Axes) -> bool:
    """Whether a parameter is a bias of attention for each head and distance."""
    own = _own_axes(axes.get(name, ()))
    return own == ("positions", "heads") if own else _RELATIVE_BIAS in name
