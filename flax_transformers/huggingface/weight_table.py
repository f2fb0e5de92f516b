"""Tables of weight names, and their rows for a given model.

A row maps one of our parameters to a tensor of a published file, and the axes of one to those of
the other; ``weights`` reads and writes whole models by it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict


@dataclass(frozen=True)
class Weight:
    """One of our parameters and the published tensor that holds it.

    ``{layer}`` in both names means every layer of a stack; our side then names the part and
    block and keeps a leading axis over repeats (see ``models/layers/stack.py``), which ``axes``
    leaves out. In their name ``{repeat}`` and ``{block}`` may stand for the place in that axis and
    the number of the block instead. ``{expert}`` in their name means every index on the next axis
    of ours, which ``axes`` leaves out too. ``axes`` gives a letter to each axis of ours and, after
    an arrow, the same letters in the order of theirs, with parentheses around axes that they merge:
    "DNH->(NH)D". A 1 is an axis of length one that ours does not have: "D->11D". Without the arrow
    the order is the same; empty means equal in everything. The letter V is the vocabulary, padded
    in ours and not in theirs.

    Several names in ``ours`` are concatenated in the tensor, along ``axis`` of theirs.

    A row whose parameters a model does not have (such as biases) is skipped.

    ``unused``: a tensor that the original has and never reads. It is skipped when reading, and
    written as a copy of ``ours``, which another row reads.

    ``vocab_size``: the length of V if it is not the config's (a target vocabulary).
    """

    ours: str | tuple[str, ...]
    theirs: str
    axes: str = ""
    axis: int = 0
    unused: bool = False
    vocab_size: int | None = None


def linear(ours: str, theirs: str, ins: str, outs: str) -> tuple[Weight, Weight]:
    """Kernel and bias of a linear layer: ours ``[ins..., outs...]``, torch's ``[outs, ins]``."""
    return (
        Weight(f"{ours}/kernel", f"{theirs}.weight", f"{ins}{outs}->({outs})({ins})"),
        Weight(f"{ours}/bias", f"{theirs}.bias", f"{outs}->({outs})"),
    )


def attention(ours: str, theirs: str, names: str) -> tuple[Weight, ...]:
    """The projections of an attention layer, not fused: ``names`` are theirs of query, key, value
    and output, separated by spaces."""
    query, key, value, output = (f"{theirs}.{name}" for name in names.split())
    return (
        *linear(f"{ours}/query", query, "D", "NH"),
        *linear(f"{ours}/key", key, "D", "NH"),
        *linear(f"{ours}/value", value, "D", "NH"),
        *linear(f"{ours}/output", output, "NH", "D"),
    )


def norm(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """Scale and bias of a norm."""
    return Weight(f"{ours}/scale", f"{theirs}.weight"), Weight(f"{ours}/bias", f"{theirs}.bias")


def fused(ours: tuple[str, ...], theirs: str, axes: str, axis: int = 0) -> Weight:
    """Several parameters concatenated in one tensor, in order along ``axis`` of theirs.

    ``axes`` applies to each; their sizes along ``axis`` may differ (fewer key heads).
    """
    return Weight(ours, theirs, axes, axis)


def fused_linear(ours: tuple[str, ...], theirs: str, ins: str, outs: str) -> tuple[Weight, Weight]:
    """Kernels and biases of linear layers that are fused in the file; see ``linear``."""
    kernel, bias = linear("", theirs, ins, outs)
    return (
        fused(tuple(f"{layer}/kernel" for layer in ours), kernel.theirs, kernel.axes),
        fused(tuple(f"{layer}/bias" for layer in ours), bias.theirs, bias.axes),
    )


@dataclass(frozen=True)
class WeightTable:
    """The tensors in the files of a family.

    ``renames``: (regular expression, replacement) pairs that turn the names of older files into
    those of the table. ``copies``: names under which a file may hold a tensor once more, each with
    the name in the table; a copy must hold the same numbers, and is read if a file has no other.
    ``ignorable``: regular expressions of (renamed) tensors in files that the model does not use.
    ``prefix``: the start of the names of the model without its heads ("bert."); files of such
    models leave it out, so a name that is not known is tried with it and without it. Any other
    additional tensor is an error.
    """

    weights: tuple[Weight, ...]
    renames: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    ignorable: tuple[str, ...] = ()
    prefix: str = ""

    def bare(self) -> WeightTable:
        """The table for files without the prefix, of the model without heads."""

        def strip(name: str) -> str:
            return name.removeprefix(self.prefix)

        return dataclasses.replace(
            self,
            weights=tuple(dataclasses.replace(w, theirs=strip(w.theirs)) for w in self.weights),
            copies={strip(copy): strip(name) for copy, name in self.copies.items()},
            ignorable=tuple(p.removeprefix(re.escape(self.prefix)) for p in self.ignorable),
        )


@dataclass(frozen=True)
class Slot:
    """The parameters of a published tensor, and the index on their first axes."""

    paths: tuple[str, ...]
    index: tuple[int, ...]
    axes: str
    axis: int
    unused: bool = False
    vocab_size: int | None = None


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


def find_slots(table: WeightTable, params: Mapping[str, Any]) -> dict[str, Slot]:
    """Published name to slot. Raises ValueError if the table does not cover every parameter."""
    leaves = flatten_dict(params, sep="/")
    slots = {}
    for weight in table.weights:
        for theirs, paths, index in _places(weight, params):
            absent = [path for path in paths if path not in leaves]
            if len(absent) == len(paths):
                continue
            if absent:
                raise ValueError(f"{theirs} holds {some(absent)}, which the model does not have")
            if "{expert}" not in theirs:
                slots[theirs] = Slot(
                    paths, index, weight.axes, weight.axis, weight.unused, weight.vocab_size
                )
                continue
            for expert in range(leaves[paths[0]].shape[len(index)]):
                name = theirs.replace("{expert}", str(expert))
                slots[name] = Slot(paths, (*index, expert), weight.axes, weight.axis)
    uncovered = sorted(set(leaves) - {path for slot in slots.values() for path in slot.paths})
    if uncovered:
        raise ValueError(f"the weight table has no row for {some(uncovered)}")
    return slots


def _places(
    weight: Weight, params: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Their name, our paths and the index on the layer axis, for every layer of a row."""
    ours = (weight.ours,) if isinstance(weight.ours, str) else weight.ours
    if "{layer}" not in ours[0]:
        yield weight.theirs, ours, ()
        return
    stack: Mapping[str, Any] = params
    for key in ours[0].split("/{layer}")[0].split("/"):
        stack = stack.get(key, {})
    for layer, (part, block, index) in enumerate(layer_places(stack)):
        paths = tuple(path.replace("{layer}", f"{part}/{block}") for path in ours)
        theirs = weight.theirs.replace("{layer}", str(layer)).replace("{repeat}", str(index))
        yield theirs.replace("{block}", block.removeprefix("block_")), paths, (index,)


def slot_shape(slot: Slot, leaves: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The shape of the published tensor of a slot."""
    first, *others = part_shapes(slot, leaves, slot.vocab_size or vocab_size)
    sizes = list(first)
    if others:
        sizes[slot.axis] += sum(shape[slot.axis] for shape in others)
    return tuple(sizes)


def read_into(result: Mapping[str, Any], slot: Slot, value: np.ndarray, vocab_size: int) -> None:
    """Write a published tensor into our parameters."""
    vocab_size = slot.vocab_size or vocab_size
    places = [result[path][(*slot.index, ...)] for path in slot.paths]
    sizes = [shape[slot.axis] for shape in part_shapes(slot, result, vocab_size)[:-1]]
    parts = np.split(value, np.cumsum(sizes), slot.axis) if sizes else [value]
    for place, part in zip(places, parts, strict=True):
        place[...] = _to_ours(slot.axes, part, place.shape, vocab_size)


def read_out(slot: Slot, leaves: Mapping[str, Any], vocab_size: int) -> np.ndarray:
    """The published tensor of a slot. Sliced on the device: only the slice comes to the host."""
    vocab_size = slot.vocab_size or vocab_size
    parts = [
        to_theirs(slot.axes, np.asarray(leaves[path][(*slot.index, ...)]), vocab_size)
        for path in slot.paths
    ]
    value = parts[0] if len(parts) == 1 else np.concatenate(parts, slot.axis)
    return np.require(value, requirements="C")


def some(names: list[str], separator: str = ", ") -> str:
    """The first four names, and the number of others. Long names are cut, and line breaks are
    escaped."""
    short = (name if len(name) <= 200 else f"{name[:200]}..." for name in names[:4])
    shown = separator.join(name if name.isprintable() else repr(name) for name in short)
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def part_shapes(slot: Slot, leaves: Mapping[str, Any], vocab_size: int) -> list[tuple[int, ...]]:
    """The shape of each part of a published tensor, of one parameter each."""
    shapes = [tuple(leaves[path].shape)[len(slot.index) :] for path in slot.paths]
    return [_their_shape(slot.axes, shape, vocab_size) for shape in shapes]


def parse_axes(axes: str) -> tuple[str, list[str]]:
    """ "DNH->(NH)D" as ("DNH", ["NH", "D"])."""
    ours, _, theirs = axes.partition("->")
    groups = [merged or one for merged, one in re.findall(r"\((\w+)\)|(\w)", theirs or ours)]
    return ours, ["" if group == "1" else group for group in groups]


def _sizes(ours: str, shape: tuple[int, ...], vocab_size: int) -> dict[str, int]:
    return dict(zip(ours, shape, strict=True)) | ({"V": vocab_size} if "V" in ours else {})


def _their_shape(axes: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    if not axes:
        return shape
    ours, groups = parse_axes(axes)
    sizes = _sizes(ours, shape, vocab_size)
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


def _to_ours(axes: str, value: np.ndarray, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    if not axes:
        return value
    ours, groups = parse_axes(axes)
    theirs, sizes = "".join(groups), _sizes(ours, shape, vocab_size)
    value = value.reshape([sizes[letter] for letter in theirs])
    value = value.transpose([theirs.index(letter) for letter in ours])
    return np.pad(value, [(0, to - size) for to, size in zip(shape, value.shape, strict=True)])


def to_theirs(axes: str, value: np.ndarray, vocab_size: int) -> np.ndarray:
    """``value`` with its axes merged and in the order of a published tensor; see ``Weight``."""
    if not axes:
        return value
    ours, groups = parse_axes(axes)
    their_shape = _their_shape(axes, value.shape, vocab_size)
    value = value[tuple(slice(vocab_size if letter == "V" else None) for letter in ours)]
    return value.transpose([ours.index(letter) for letter in "".join(groups)]).reshape(their_shape)
