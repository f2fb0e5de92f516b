"""What a family's file tells the rest of the package, and how a family is found by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from flax_transformers import families
from flax_transformers.errors import UserError
from flax_transformers.families.config_fields import with_kept
from flax_transformers.families.weights import WeightTable
from flax_transformers.models.config import TransformerConfig


@dataclass(frozen=True)
class Family:
    """One published family; every file in ``families/`` that has one calls it ``FAMILY``.

    ``config``: its class of configs, whose ``architecture`` names one of ``architectures``, the
    Hugging Face classes (``BertForMaskedLM``) that it can be. ``model_types``: the values of
    ``model_type`` in a config.json that belong to it. ``sizes``: the published ones by name.
    ``from_huggingface`` reads a config.json as a dict; ``to_huggingface`` writes one. Both raise
    UserError for what the other side does not have (use ``config_json``, which sees to the rest).
    ``weights`` is the table of weight names for one config. ``settle``, if there is one, takes a
    config and the tensors of its file by name and returns the config with what only they can tell.
    ``aliases``: second names that a config.json may have for a field, to the family's own name.
    """

    config: type[TransformerConfig]
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    sizes: Mapping[str, TransformerConfig]
    from_huggingface: Callable[[Mapping[str, Any]], TransformerConfig]
    to_huggingface: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any], WeightTable]
    settle: Callable[[Any, Mapping[str, Any]], Any] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


@cache
def all_families() -> tuple[Family, ...]:
    """Every family: a new file in the folder is enough."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_of(config: TransformerConfig) -> Family:
    """The family that a config belongs to. Raises UserError if it is none's."""
    for family in all_families():
        if type(config) is family.config:
            return family
    raise UserError(f"{type(config).__name__} belongs to no family with a Hugging Face format")


def family_of_json(config: Mapping[str, Any]) -> Family:
    """The family of a config.json: by ``architectures``, else by ``model_type``.

    Raises UserError, naming what is supported, if no family knows either.
    """
    architecture = (config.get("architectures") or [None])[0]
    model_type = config.get("model_type")
    for family in all_families():
        if architecture in family.architectures or (
            architecture is None and model_type in family.model_types
        ):
            return family
    known = sorted(name for family in all_families() for name in family.architectures)
    raise UserError(
        f"config.json names architecture {architecture!r} (model_type {model_type!r}), which is "
        f"not supported; supported are {', '.join(known)}"
    )


ONLY_IN_TRAINING = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "drop_path",
    "classifier_dropout",
    "init_std",
    "scaled_residual_init",
}
"""Fields that may be lost on the way out: they do not change what a trained model computes."""


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model. Raises UserError if reading it would give another model."""
    family = family_of(config)
    written = family.to_huggingface(config)
    read = family.from_huggingface(written)
    ignored = ONLY_IN_TRAINING | {"hub_fields", "generation"}  # which are written beside
    if config.architecture.endswith("ForQuestionAnswering"):
        ignored |= {"num_labels", "label_names"}  # its head marks two places, whatever they say
    for each in fields(config):
        ours, theirs = getattr(config, each.name), getattr(read, each.name)
        if ours != theirs and each.name not in ignored:
            raise UserError(
                f"model.{each.name} is {ours!r}, which {config.architecture} in Hugging Face "
                "format cannot be; keep this model in our own checkpoint format"
            )
    return with_kept(written, config, family.aliases)


def published_sizes() -> dict[str, TransformerConfig]:
    """Every published size of every family by name, such as ``bert-base``."""
    return {name: config for family in all_families() for name, config in family.sizes.items()}
