"""Published tensors to parameters and back, by a table of weight names.

A family maps its parameters to the tensors of published files in a ``weight_table``. Stacking of
layers, padding of the vocabulary and names in error messages are the same for every family.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.huggingface.weight_table import (
    Slot,
    Weight,
    WeightTable,
    attention,
    find_slots,
    fused,
    fused_linear,
    layer_places,
    linear,
    norm,
    read_into,
    read_out,
    slot_shape,
    some,
)

__all__ = [
    "Weight",
    "WeightTable",
    "attention",
    "export_tensors",
    "fused",
    "fused_linear",
    "known_names",
    "layer_places",
    "linear",
    "names_in_table",
    "norm",
    "read_parameters",
    "tensor_dtypes",
    "tensor_shapes",
]


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
