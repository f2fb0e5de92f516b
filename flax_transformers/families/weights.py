"""Reads a table of weight names in both directions: published tensors in, published tensors out.

A family states once which of its parameters is which tensor of a published file and how the axes
of one become those of the other. Everything else, from the stacking of layers to the padding of the
vocabulary and the names in error messages, is the same for every family and stands here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.errors import UserError


@dataclass(frozen=True)
class Weight:
    """One of our parameters and the published tensor that holds it.

    ``{layer}`` in both names stands for every layer of a stack; our side then names the part and
    block and keeps a leading axis over repeats (see ``models/stack.py``), which ``axes`` leaves
    out. ``axes`` gives a letter to each axis of ours and, after an arrow, the same letters in the
    order of theirs, with parentheses around axes that they merge: "DNH->(NH)D". Without the arrow
    the order is the same; empty means equal in everything. The letter V is the vocabulary, padded
    in ours and not in theirs.

    A row whose parameter a model does not have (biases left out) is passed over.
    """

    ours: str
    theirs: str
    axes: str = ""


def linear(ours: str, theirs: str, ins: str, outs: str) -> tuple[Weight, Weight]:
    """Kernel and bias of a linear layer: ours ``[ins..., outs...]``, torch's ``[outs, ins]``."""
    return (
        Weight(f"{ours}/kernel", f"{theirs}.weight", f"{ins}{outs}->({outs})({ins})"),
        Weight(f"{ours}/bias", f"{theirs}.bias", f"{outs}->({outs})"),
    )


def norm(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """Scale and bias of a norm."""
    return Weight(f"{ours}/scale", f"{theirs}.weight"), Weight(f"{ours}/bias", f"{theirs}.bias")


@dataclass(frozen=True)
class WeightTable:
    """All that a family says about the tensors of its files.

    ``renames``: (regular expression, replacement) pairs that turn the names of older files into
    those of the table. ``copies``: names under which a file may hold a tensor once more, each with
    the name in the table; a copy must hold the same numbers, and stands in for the tensor itself
    where a file has the copy alone. ``ignorable``: regular expressions of the (renamed) tensors
    that files carry and the model has no use for. Anything else that is extra is an error.
    """

    weights: tuple[Weight, ...]
    renames: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    ignorable: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Slot:
    """Where one published tensor lives: a parameter, and the index on its layer axis if stacked."""

    path: str
    index: int | None
    axes: str


def parameter_shapes(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """The parameters of ``model`` as nested ``jax.ShapeDtypeStruct``; nothing is allocated."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return nn.meta.unbox(boxed)


def layer_places(stack: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """For each layer, in order, the (part, block, index) of a stack's parameters that hold it."""
    places = []
    for part in ("first", "layers", "remainder"):
        blocks = stack.get(part, {})
        repeats = jax.tree.leaves(blocks)[0].shape[0] if blocks else 0
        places += [
            (part, f"block_{b}", index) for index in range(repeats) for b in range(len(blocks))
        ]
    return places


def tensor_shapes(
    table: WeightTable, params: Mapping[str, Any], vocab_size: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that make up ``params`` (arrays or their shapes).

    Their sizes add up to the published number of parameters: padding is not in it.
    """
    leaves = flatten_dict(params, sep="/")
    return {
        name: _their_shape(slot.axes, _slot_shape(slot, leaves), vocab_size)
        for name, slot in _slots(table, params).items()
    }


def import_weights(
    table: WeightTable,
    tensors: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    vocab_size: int,
) -> dict[str, Any]:
    """Parameters as nested numpy arrays, of the shapes and dtypes of ``params``.

    ``tensors`` is read once per name, in its own order, and nothing is kept of it: a mapping that
    reads a file when asked needs memory for the result and one tensor. Padded vocabulary rows are
    zero. Raises UserError, with names, for tensors that are missing, extra, of another shape, not
    floating point, or copies that differ from the original.
    """
    slots = _slots(table, params)
    leaves = flatten_dict(params, sep="/")
    sources, copies = _sources(table, tensors, slots)
    result = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    shapes = tensor_shapes(table, params, vocab_size)
    misshaped = []
    for source, name in sources.items():
        value, slot = _floating(tensors[source], source), slots[name]
        if value.shape != shapes[name]:
            misshaped.append(f"{source} is {list(value.shape)}, not {list(shapes[name])}")
            continue
        place = result[slot.path] if slot.index is None else result[slot.path][slot.index]
        place[...] = _to_ours(slot.axes, value, place.shape, vocab_size)
    if misshaped:
        raise UserError(
            f"{len(misshaped)} tensor(s) do not have the shape that the configuration gives them: "
            f"{_some(misshaped, '; ')}; use the config.json that belongs to these weights"
        )
    for source, name in copies.items():
        slot = slots[name]
        leaf = result[slot.path] if slot.index is None else result[slot.path][slot.index]
        copy = np.asarray(_floating(tensors[source], source), leaf.dtype)
        if not np.array_equal(copy, _to_theirs(slot.axes, leaf, vocab_size), equal_nan=True):
            raise UserError(
                f"{source} differs from {name}, but this model has one parameter for both; "
                "weights that are not tied cannot be read"
            )
    return unflatten_dict(result, sep="/")


def export_weights(
    table: WeightTable, params: Mapping[str, Any], vocab_size: int
) -> dict[str, np.ndarray]:
    """The published tensors, by name, without copies and without padded vocabulary rows."""
    leaves = flatten_dict(params, sep="/")
    tensors = {}
    for name, slot in _slots(table, params).items():
        leaf = np.asarray(leaves[slot.path])
        value = leaf if slot.index is None else leaf[slot.index]
        tensors[name] = np.ascontiguousarray(_to_theirs(slot.axes, value, vocab_size))
    return tensors


def _slots(table: WeightTable, params: Mapping[str, Any]) -> dict[str, _Slot]:
    """Published name to place. Raises ValueError if the table does not cover every parameter."""
    leaves = flatten_dict(params, sep="/")
    slots = {}
    for weight in table.weights:
        if "{layer}" not in weight.ours:
            slots[weight.theirs] = _Slot(weight.ours, None, weight.axes)
            continue
        stack = params
        for key in weight.ours.split("/{layer}")[0].split("/"):
            stack = stack[key]
        for layer, (part, block, index) in enumerate(layer_places(stack)):
            path = weight.ours.replace("{layer}", f"{part}/{block}")
            slots[weight.theirs.replace("{layer}", str(layer))] = _Slot(path, index, weight.axes)
    slots = {name: slot for name, slot in slots.items() if slot.path in leaves}
    uncovered = sorted(set(leaves) - {slot.path for slot in slots.values()})
    if uncovered:
        raise ValueError(f"the weight table has no row for {_some(uncovered)}")
    return slots


def _sources(
    table: WeightTable, tensors: Iterable[str], slots: Mapping[str, _Slot]
) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the file, each with its name in the table: the tensors to read, and their copies."""
    sources: dict[str, str] = {}
    copies: dict[str, str] = {}
    extra: list[str] = []
    twice: list[str] = []
    taken: set[str] = set()
    for source in tensors:
        name = source
        for pattern, replacement in table.renames:
            name = re.sub(pattern, replacement, name)
        if name in slots:
            twice += [source] * (name in taken)
            taken.add(name)
            sources[source] = name
        elif table.copies.get(name) in slots:
            copies[source] = table.copies[name]
        elif not any(re.fullmatch(pattern, name) for pattern in table.ignorable):
            extra.append(source)
    for source, name in list(copies.items()):
        if name not in taken:
            taken.add(name)
            sources[source] = copies.pop(source)
    missing = [name for name in slots if name not in taken]
    for names, problem in (
        (missing, "missing from the file"),
        (extra, "in the file but not in the model"),
        (twice, "in the file under an older name as well"),
    ):
        if names:
            raise UserError(
                f"{len(names)} tensor(s) {problem}: {_some(names)}; check that config.json and "
                "weights belong together and are of a supported architecture"
            )
    return sources, copies


def _some(names: list[str], separator: str = ", ") -> str:
    shown = separator.join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _floating(value: np.ndarray, name: str) -> np.ndarray:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(
            f"tensor {name} is {value.dtype}; only floating-point weights can be read, so convert "
            "a quantised file back first"
        )
    return value


def _slot_shape(slot: _Slot, leaves: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(leaves[slot.path].shape)
    return shape if slot.index is None else shape[1:]


def _parse(axes: str) -> tuple[str, list[str]]:
    """ "DNH->(NH)D" as ("DNH", ["NH", "D"])."""
    ours, _, theirs = axes.partition("->")
    groups = [merged or one for merged, one in re.findall(r"\((\w+)\)|(\w)", theirs or ours)]
    return ours, groups


def _sizes(ours: str, shape: tuple[int, ...], vocab_size: int) -> dict[str, int]:
    return dict(zip(ours, shape, strict=True)) | ({"V": vocab_size} if "V" in ours else {})


def _their_shape(axes: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    if not axes:
        return shape
    ours, groups = _parse(axes)
    sizes = _sizes(ours, shape, vocab_size)
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


def _to_ours(axes: str, value: np.ndarray, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    if not axes:
        return value
    ours, groups = _parse(axes)
    theirs, sizes = "".join(groups), _sizes(ours, shape, vocab_size)
    value = value.reshape([sizes[letter] for letter in theirs])
    value = value.transpose([theirs.index(letter) for letter in ours])
    return np.pad(value, [(0, to - size) for to, size in zip(shape, value.shape, strict=True)])


def _to_theirs(axes: str, value: np.ndarray, vocab_size: int) -> np.ndarray:
    if not axes:
        return value
    ours, groups = _parse(axes)
    their_shape = _their_shape(axes, value.shape, vocab_size)
    value = value[tuple(slice(vocab_size if letter == "V" else None) for letter in ours)]
    return value.transpose([ours.index(letter) for letter in "".join(groups)]).reshape(their_shape)
