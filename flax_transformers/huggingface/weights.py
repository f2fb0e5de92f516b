"""Published tensors to parameters and back, by a table of weight names.

A family maps its parameters to the tensors of published files in a table: a row maps one of our
parameters to a tensor of a file, and the axes of one to those of the other. Stacking of layers,
padding of the vocabulary and names in error messages are the same for every family.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.models.config import TextConfig, TransformerConfig

log = logging.getLogger(__name__)

_INNER_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Prefixes that torch.compile, FSDP and activation checkpointing insert anywhere in a name."""

_BLOCK = 64, 256  # rows and columns that are transposed at once
_AXES = {"vocab_size", "hidden_size", "intermediate_size", "decoder_vocab_size", "token_types"}
"""Fields that are the length of an axis of some tensor."""


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


def tied(config: TextConfig, output: str, table: str) -> dict[str, str]:
    """The tensor of the output layer, a copy of the embeddings if both are one parameter. Without
    ties it is a head of its own, which classifiers do not have."""
    return {output: table} if config.tie_embeddings else {}


def fused_linear(ours: tuple[str, ...], theirs: str, ins: str, outs: str) -> tuple[Weight, Weight]:
    """Kernels and biases of linear layers that are fused in the file; see ``linear``."""
    kernel, bias = linear("", theirs, ins, outs)
    return (
        Weight(tuple(f"{layer}/kernel" for layer in ours), kernel.theirs, kernel.axes),
        Weight(tuple(f"{layer}/bias" for layer in ours), bias.theirs, bias.axes),
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

        return replace(
            self,
            weights=tuple(replace(w, theirs=strip(w.theirs)) for w in self.weights),
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
    """Write a published tensor into our parameters, zeros so far."""
    vocab_size = slot.vocab_size or vocab_size
    places = [result[path][(*slot.index, ...)] for path in slot.paths]
    sizes = [shape[slot.axis] for shape in part_shapes(slot, result, vocab_size)[:-1]]
    parts = np.split(value, np.cumsum(sizes), slot.axis) if sizes else [value]
    for place, part in zip(places, parts, strict=True):
        _copy(place, _to_ours(slot.axes, part, place.shape, vocab_size))


def _copy(place: np.ndarray, value: np.ndarray) -> None:
    """Copies ``value`` to the start of ``place``. In blocks, because a large matrix that is
    transposed at once is read a cache line per number."""
    start: tuple[Any, ...] = (*map(slice, value.shape), ...)
    place = place[start]
    if value.ndim < 2 or value.flags.c_contiguous:
        place[...] = value
        return
    for rows in range(0, value.shape[0], _BLOCK[0]):
        for columns in range(0, value.shape[1], _BLOCK[1]):
            block = slice(rows, rows + _BLOCK[0]), slice(columns, columns + _BLOCK[1])
            place[block] = value[block]


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
    return value.transpose([theirs.index(letter) for letter in ours])


def to_theirs(axes: str, value: np.ndarray, vocab_size: int) -> np.ndarray:
    """``value`` with its axes merged and in the order of a published tensor; see ``Weight``."""
    if not axes:
        return value
    ours, groups = parse_axes(axes)
    their_shape = _their_shape(axes, value.shape, vocab_size)
    value = value[tuple(slice(vocab_size if letter == "V" else None) for letter in ours)]
    return value.transpose([ours.index(letter) for letter in "".join(groups)]).reshape(their_shape)


def tensor_shapes(
    table: WeightTable, params: Mapping[str, Any], vocab_size: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors of ``params`` (arrays or their shapes).

    Their sizes add up to the published number of parameters, without padding.
    """
    leaves = flatten_dict(params, sep="/")
    shapes = {}
    for name, slot in find_slots(table, params).items():
        shapes[name] = slot_shape(slot, leaves, vocab_size)
    return shapes


def tensor_dtypes(table: WeightTable, params: Mapping[str, Any]) -> dict[str, np.dtype]:
    """The dtype of each published tensor, for the names of ``tensor_shapes``."""
    leaves = flatten_dict(params, sep="/")
    return {
        name: np.result_type(*(leaves[path].dtype for path in slot.paths))
        for name, slot in find_slots(table, params).items()
    }


def known_names(
    table: WeightTable, tensors: Iterable[str], params: Mapping[str, Any]
) -> frozenset[str]:
    """Names in a file that the table of ``params`` knows."""
    slots = find_slots(table, params)
    return frozenset(name for name in tensors if _meaning(table, name, slots)[0] != "extra")


def names_in_table(
    table: WeightTable, tensors: Iterable[str], params: Mapping[str, Any]
) -> dict[str, str]:
    """The name in the table of each tensor in a file that is a weight of ``params``."""
    slots = find_slots(table, params)
    meanings = {name: _meaning(table, name, slots) for name in tensors}
    return {name: own for name, (kind, own) in meanings.items() if kind == "weight"}


def read_parameters(
    table: WeightTable,
    tensors: Mapping[str, Any],
    params: Mapping[str, Any],
    vocab_size: int,
    *,
    ignored: Collection[str] = (),
    fresh: Collection[str] = (),
    resized_heads: bool = False,
    required: Collection[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """One parameter after another, as its path and a numpy array of the shape and dtype in params.

    ``tensors``: arrays, or anything with a shape and a dtype that ``np.asarray`` reads when its
    turn comes, so that memory is needed for one parameter at a time. Every tensor is read once.
    Padded vocabulary rows are zero. ``ignored``: names in the file to skip. ``fresh``: names of
    heads (top-level groups of params) that are left out of the result if the file lacks them,
    except those in ``required``; with ``resized_heads`` also if the file has them in another shape.

    Raises UserError, with names, before anything is read, for tensors that are missing, extra, of
    another shape or not floating point; and for copies that differ from the original.
    """
    slots = find_slots(table, params)
    leaves = flatten_dict(params, sep="/")
    shapes = tensor_shapes(table, params, vocab_size)
    sources, copies, unknown, twice = _sources(table, tensors, slots, ignored)
    views = {source: tensors[source] for source in (*sources, *copies)}
    if fresh:
        wrong = [name for source, name in sources.items() if views[source].shape != shapes[name]]
        absent = _absent_heads(fresh, slots, set(sources.values()), wrong if resized_heads else ())
        absent -= set(required)
        slots = {name: slot for name, slot in slots.items() if _group(slot) not in absent}
        sources = {source: name for source, name in sources.items() if name in slots}
        copies = {source: name for source, name in copies.items() if name in slots}
    present = set(sources.values())
    missing = [name for name in slots if name not in present and not slots[name].unused]
    _require_fit(missing, unknown, twice)
    _require_kind(sources, copies, views, shapes)
    together: dict[tuple[str, ...], list[str]] = {}
    for source, name in sources.items():
        together.setdefault(slots[name].paths, []).append(source)
    for paths, group in together.items():
        result = {path: np.zeros(leaves[path].shape, leaves[path].dtype) for path in paths}
        for source in group:
            read_into(result, slots[sources[source]], np.asarray(views[source]), vocab_size)
        for source, name in copies.items():
            if slots[name].paths == paths:
                copy = np.asarray(views[source])
                _require_equal(source, name, copy, slots[name], result, vocab_size)
        # Yielded one by one and released, so that the caller decides what to keep in memory.
        for path in paths:
            yield path, result.pop(path)


def export_tensors(
    table: WeightTable,
    params: Mapping[str, Any],
    vocab_size: int,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The published tensors one after another: those in ``names``, in that order, or all.

    There are no copies among them, and no padded vocabulary rows.
    """
    leaves = flatten_dict(params, sep="/")
    slots = find_slots(table, params)
    for name in slots if names is None else names:
        yield name, read_out(slots[name], leaves, vocab_size)


def _group(slot: Slot) -> str:
    return slot.paths[0].partition("/")[0]


def _absent_heads(
    fresh: Collection[str],
    slots: Mapping[str, Slot],
    present: Collection[str],
    misshaped: Collection[str],
) -> set[str]:
    """Those heads of which the file has nothing, or something of another shape."""
    heads: dict[str, list[str]] = {}
    for name, slot in slots.items():
        if _group(slot) in fresh:
            heads.setdefault(_group(slot), []).append(name)
    return {
        head
        for head, names in heads.items()
        if not any(name in present for name in names) or any(name in misshaped for name in names)
    }


def _meaning(table: WeightTable, source: str, slots: Mapping[str, Slot]) -> tuple[str, str]:
    """The kind of a name in a file, "weight", "copy", "ignorable" or "extra", and its tensor."""
    renamed = source
    for pattern, replacement in table.renames:
        renamed = re.sub(pattern, replacement, renamed)
    for name in (renamed, table.prefix + renamed, renamed.removeprefix(table.prefix)):
        if name in slots:
            return "ignorable" if slots[name].unused else "weight", name
        if table.copies.get(name) in slots:
            return "copy", table.copies[name]
        if any(re.fullmatch(pattern, name) for pattern in table.ignorable):
            return "ignorable", name
    return "extra", source


def _sources(
    table: WeightTable,
    tensors: Iterable[str],
    slots: Mapping[str, Slot],
    ignored: Collection[str],
) -> tuple[dict[str, str], dict[str, str], list[str], list[str]]:
    """Names in the file: the tensors to read and the copies to compare, each with its name in the
    table; then those that mean nothing, and those that are there under another name as well."""
    sources: dict[str, str] = {}
    copies: dict[str, str] = {}
    unknown: list[str] = []
    twice: list[str] = []
    taken: set[str] = set()
    for source in tensors:
        meaning, name = _meaning(table, source, slots)
        if meaning == "weight":
            twice += [source] * (name in taken)
            taken.add(name)
            sources[source] = name
        elif meaning == "copy":
            copies[source] = name
        elif meaning == "extra" and source not in ignored:
            unknown.append(source)
    for source, name in list(copies.items()):
        if name not in taken:
            taken.add(name)
            sources[source] = copies.pop(source)
    return sources, copies, unknown, twice


def _require_fit(missing: list[str], unknown: list[str], twice: list[str]) -> None:
    problems = [
        f"{len(names)} tensor(s) {problem}: {some(names)}"
        for names, problem in (
            (missing, "missing from the file"),
            (unknown, "in the file but not in the model"),
            (twice, "in the file under an older name as well"),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; check that config.json and weights belong together and are "
            "of a supported architecture"
        )


def _require_kind(
    sources: Mapping[str, str],
    copies: Collection[str],
    views: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for source in (*sources, *copies):
        if not jnp.issubdtype(views[source].dtype, jnp.floating):
            raise UserError(
                f"tensor {source} is {views[source].dtype}; only floating-point weights can be "
                "read, so convert a quantised file back first"
            )
    misshaped = [
        f"{source} is {list(views[source].shape)}, not {list(shapes[name])}"
        for source, name in sources.items()
        if views[source].shape != shapes[name]
    ]
    if misshaped:
        raise UserError(
            f"{len(misshaped)} tensor(s) do not have the shape that the configuration gives them: "
            f"{some(misshaped, '; ')}; use the config.json that belongs to these weights"
        )


def _require_equal(
    source: str, name: str, copy: np.ndarray, slot: Slot, ours: Mapping[str, Any], vocab_size: int
) -> None:
    value = read_out(slot, ours, vocab_size)
    if not np.array_equal(copy.astype(value.dtype), value, equal_nan=True):
        raise UserError(
            f"{source} differs from {name}, but this model has one parameter for both; "
            "weights that are not tied cannot be read"
        )


def require_sizes(config: TransformerConfig, tensors: Mapping[str, Any]) -> None:
    """Raise UserError for sizes that the tensors of a file cannot have.

    Only numbers are compared, so that a hostile config cannot cause long loops.
    """
    longest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)
    for name in (one.name for one in fields(config)):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name == "num_layers":
            value //= config.layer_uses  # which have the same tensors
        counted = name.endswith(("layers", "experts"))
        bound = len(tensors) if counted else longest if name in _AXES else value
        if value > bound:
            problem = "holds only" if counted else "has no axis longer than"
            raise UserError(
                f"config.json gives the model {name} {value}, but the file {problem} {bound}"
                f"{' tensors' if counted else ''}; use the config.json that belongs to these "
                "weights"
            )


def unwrapped(tensors: Mapping[str, Any], table: WeightTable) -> Mapping[str, Any]:
    """Tensors by name, without the prefixes of wrappers of the model.

    These are torch.compile (``_orig_mod.``), DistributedDataParallel (``module.``), FSDP, and the
    attribute of a Lightning module or a training script that holds the model (``model.``): any
    beginning that all names share, if without it more of them are known to the ``table``.
    """
    inner = {name: _INNER_WRAPPERS.sub("", name) for name in tensors}
    known = _recogniser(table)
    best, most = 0, -1
    for depth in range(_shared_depth(inner.values()) + 1):
        count = sum(known(_without(name, depth)) for name in inner.values())
        if count > most:
            best, most = depth, count
    names = {name: _without(short, best) for name, short in inner.items()}
    changed = [name for name, short in names.items() if name != short]
    if not changed:
        return tensors
    if len(set(names.values())) < len(names):
        raise UserError(
            f"the file holds tensors with and without a wrapper's name, such as {changed[0]}; save "
            "the state_dict of the model alone"
        )
    log.info("tensor names are read without wrappers: %s as %s", changed[0], names[changed[0]])
    return {names[name]: tensor for name, tensor in tensors.items()}


def head_names(table: WeightTable, names: Iterable[str], body: Collection[str]) -> set[str]:
    """Those of the names that belong to a head in the table, whether or not the model has it.

    ``body``: top-level names of the parameters that are no head's.
    """

    def of_head(row: Weight) -> bool:
        ours = row.ours if isinstance(row.ours, str) else row.ours[0]
        return ours.partition("/")[0] not in body

    weights = tuple(filter(of_head, table.weights))
    return set(filter(_recogniser(replace(table, weights=weights, copies={}, ignorable=())), names))


def _shared_depth(names: Any) -> int:
    """Number of leading components that all names share, not counting their last."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _without(name: str, depth: int) -> str:
    return name.split(".", depth)[-1]


def _recogniser(table: WeightTable) -> Callable[[str], bool]:
    """A function that tells whether a table knows a name."""
    rows = [re.escape(row.theirs) for row in table.weights]
    rows += [re.escape(copy) for copy in table.copies]
    rows = [re.sub(r"\\{(layer|repeat|block|expert)\\}", r"\\d+", row) for row in rows]
    pattern = re.compile("|".join([*rows, *table.ignorable]))

    def known(name: str) -> bool:
        for old, new in table.renames:
            name = re.sub(old, new, name)
        tries = (name, table.prefix + name, name.removeprefix(table.prefix))
        return any(pattern.fullmatch(each) for each in tries)

    return known
