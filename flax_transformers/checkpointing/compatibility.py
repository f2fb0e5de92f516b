"""Which arrays of a state a checkpoint holds, and whether they are the ones that are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from flax_transformers.checkpointing.step_directories import few
from flax_transformers.errors import UserError


def as_saved(state: Any) -> Any:
    """A state as a checkpoint has it: the fields of a dataclass as a dict. Each has the name
    ``saved_as`` of its metadata, or its own. Other trees are returned as they are."""
    if not dataclasses.is_dataclass(state) or isinstance(state, type):
        return state
    return {_saved_name(field): getattr(state, field.name) for field in dataclasses.fields(state)}


def from_saved(wanted: Any, saved: Any) -> Any:
    """The inverse of ``as_saved``; fields that ``saved`` lacks are those of ``wanted``."""
    if not dataclasses.is_dataclass(wanted) or isinstance(wanted, type):
        return saved
    names = {_saved_name(field): field.name for field in dataclasses.fields(wanted)}
    return dataclasses.replace(wanted, **{names[name]: part for name, part in saved.items()})


def _saved_name(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("saved_as", field.name))


def without_missing(saved: Mapping[str, Any], wanted: Any) -> tuple[Any, list[str]]:
    """``wanted`` with None for its optional fields that a checkpoint lacks, and their saved names.

    ``wanted`` is a dataclass of trees, whose fields with a default are optional: the checkpoint may
    be older than the field, or the run did not keep it. Other trees are returned as they are.
    """
    if not dataclasses.is_dataclass(wanted) or isinstance(wanted, type):
        return wanted, []
    missing = {
        _saved_name(field): field.name
        for field in dataclasses.fields(wanted)
        if field.default is not dataclasses.MISSING
        and jax.tree.leaves(getattr(wanted, field.name))
        and not jax.tree.leaves(saved.get(_saved_name(field)), is_leaf=is_array)
    }
    return dataclasses.replace(wanted, **dict.fromkeys(missing.values())), list(missing)


def without_unwanted(saved: Mapping[str, Any], wanted: Any) -> tuple[dict[str, Any], list[str]]:
    """What a checkpoint has without the optional fields that are None in ``wanted``, and their
    saved names: the run does not keep them any longer."""
    if not dataclasses.is_dataclass(wanted) or isinstance(wanted, type):
        return dict(saved), []
    unwanted = [
        _saved_name(field)
        for field in dataclasses.fields(wanted)
        if field.default is not dataclasses.MISSING
        and getattr(wanted, field.name) is None
        and jax.tree.leaves(saved.get(_saved_name(field)), is_leaf=is_array)
    ]
    return {name: each for name, each in saved.items() if name not in unwanted}, unwanted


def require_same_structure(folder: epath.Path, saved: Any, wanted: Any) -> None:
    """Raises UserError naming what is missing, unexpected or of another shape or dtype."""
    there, here = dict(_described(saved)), dict(_described(wanted))
    lacks = [f"lacks {name}" for name in _sorted(here.keys() - there.keys())]
    adds = [f"also has {name}" for name in _sorted(there.keys() - here.keys())]
    other = [
        f"has {name} as {there[name]}, not {here[name]}"
        for name in _sorted(here.keys() & there.keys())
        if there[name] != here[name]
    ]
    differences = [few(kind, "; ") for kind in (other, lacks, adds) if kind]
    if differences:
        raise UserError(
            f"checkpoint {folder} is of another model or optimizer: it {'; '.join(differences)}; "
            "nothing was changed: choose another --workdir, or the config it was written with"
        )


def _sorted(names: Iterable[str]) -> list[str]:
    """Parameters first: the rest follows from them."""
    return sorted(names, key=lambda name: (not name.startswith("params/"), name))


def _described(tree: Any) -> Iterator[tuple[str, str]]:
    """Each array's path and `dtype[shape]`, the same for a pytree and for orbax's record of it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_array):
        keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as its key data
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        shape = ",".join(str(size) for size in leaf.shape)
        yield "/".join(str(key) for key in keys), f"{np.dtype(leaf.dtype).name}[{shape}]"


def is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")
