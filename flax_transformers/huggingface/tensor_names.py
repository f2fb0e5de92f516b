"""Checks of the names and sizes of tensors in a file against its config.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from flax_transformers.errors import UserError
from flax_transformers.huggingface.weights import Weight, WeightTable
from flax_transformers.models.config import TransformerConfig

logger = logging.getLogger(__name__)

_INNER_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Prefixes that torch.compile, FSDP and activation checkpointing insert anywhere in a name."""

_AXES = {"vocab_size", "hidden_size", "intermediate_size", "decoder_vocab_size", "token_types"}
"""Fields that are the length of an axis of some tensor."""


def require_sizes(config: TransformerConfig, tensors: Mapping[str, Any]) -> None:
    """Raise UserError for sizes that the tensors of a file cannot have.

    Only numbers are compared, so that a hostile config cannot cause long loops.
    """
    longest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        counted = field.name.endswith("layers") or field.name.endswith("experts")
        bound = len(tensors) if counted else longest if field.name in _AXES else value
        if value > bound:
            problem = "holds only" if counted else "has no axis longer than"
            raise UserError(
                f"config.json gives the model {field.name} {value}, but the file {problem} {bound}"
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
    logger.info("tensor names are read without wrappers: %s as %s", changed[0], names[changed[0]])
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
