"""Families of models: how one is described and found, and how its models are built."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import flax.linen as nn

from flax_transformers import config_json as saved_configs
from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.huggingface.fields import JsonFields, with_kept
from flax_transformers.huggingface.weights import WeightTable
from flax_transformers.models.config import ComputeConfig, TextConfig, TransformerConfig
from flax_transformers.models.parts import ModelParts

log = logging.getLogger(__name__)

_FAMILIES = "flax_transformers.families"
_ARGUMENT = "architecture= (--architecture on the command line)"


def _no_format(*_: Any) -> Any:
    raise UserError(
        "this family has no Hugging Face format; keep the model as a checkpoint of ours, or give "
        "its Family from_huggingface, to_huggingface and weights"
    )


@dataclass(frozen=True)
class Family:
    """One family of models; each module in ``families/`` has one, named ``FAMILY``, and perhaps a
    tuple ``TOWERS`` of others, whose models are parts of its own.

    Families of other packages are registered by ``flax_transformers.register`` or as entry points
    of the group ``flax_transformers``. A family that exists in no other library needs only
    ``config`` and ``architectures``.
    """

    config: type[TransformerConfig]
    """Its config class."""
    architectures: Mapping[str, Callable[..., nn.Module]]
    """Model classes by the name of their Hugging Face class, such as ``BertForMaskedLM``; called as
    ``kind(config, compute)``, and with ``parts`` too if the family has any."""
    model_types: tuple[str, ...] = ()
    """Values of ``model_type`` in its config.json files."""
    sizes: Mapping[str, TransformerConfig] = field(default_factory=dict)
    """Published sizes by name."""
    parts: ModelParts | None = None
    """The family's own blocks, positions and so on, if not all are the standard ones."""
    from_huggingface: Callable[[Mapping[str, Any]], TransformerConfig] = _no_format
    """Reads a config.json. Raises UserError for what is not supported."""
    to_huggingface: Callable[[Any], dict[str, Any]] = _no_format
    """Writes a config.json; callers use ``config_json``, which checks the result."""
    weights: Callable[[Any], WeightTable] = _no_format
    """The table of tensor names for a config."""
    settle: Callable[[Any, Mapping[str, Any]], Any] | None = None
    """Takes a config and the tensors of its file; returns the config with the fields that only the
    tensors define."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names that config.json may have for a field, and the field's own name."""
    older_names: Mapping[str, str] = field(default_factory=dict)
    """Former names of its architectures, and the current ones."""
    timm_prefix: str = ""
    """Prefix of the names of its models in timm, if timm's config.json is read."""
    only_here: tuple[str, ...] = ()
    """Architectures that no other library has a class for."""
    wholes: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = field(
        default_factory=dict
    )
    """Model types of larger models whose files hold one of this family (CLIP's, of its encoders),
    and what reads the config.json of that part in theirs."""
    part: Callable[[Any, str], tuple[Any, Callable[[Any], dict[str, Any]]] | None] | None = None
    """``(config, architecture)`` returns None, or where a model of the config has one of that
    architecture as a part of its own (ELECTRA's generator), the config of the part, and a function
    from the parameters of the model to those of the part."""

    @classmethod
    def of_table(cls, table: JsonFields[Any], **others: Any) -> Family:
        """A family whose config.json is ``table``, which its class, its ``model_type`` and so on
        follow from. ``others`` are its other fields, and those in which it differs from that."""
        of_table: dict[str, Any] = {
            "config": type(table.defaults),
            "model_types": (table.fixed["model_type"],),
            "from_huggingface": table.read,
            "to_huggingface": table.write,
            "aliases": table.aliases,
        }
        return cls(**of_table | others)

    def model_type(self, architecture: str) -> str:
        """The ``model_type`` of one of the architectures."""
        name = architecture.lower()
        own = [kind for kind in self.model_types if name.startswith(kind.replace("-", ""))]
        return (own or [*self.model_types, ""])[0]


@cache
def _own_families() -> tuple[Family, ...]:
    package = importlib.import_module(_FAMILIES)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    names = [name for name in names if not name.startswith("_")]  # layers that families share
    modules = [importlib.import_module(f"{_FAMILIES}.{name}") for name in names]
    return tuple(
        family for module in modules for family in (module.FAMILY, *getattr(module, "TOWERS", ()))
    )


def all_families() -> tuple[Family, ...]:
    """All families: registered ones, and those of this package.

    Registered ones come first: files of a ``model_type`` that a user has a family for are read by
    it, also if a later release of this package has that family too.
    """
    registered = saved_configs.registered_families()
    return tuple(each for each in registered if isinstance(each, Family)) + _own_families()


def family_of(config: TransformerConfig) -> Family:
    """The family of a config. Raises UserError if no family has its class."""
    for family in all_families():
        if type(config) is family.config:
            return family
    raise UserError(
        f"{type(config).__name__} is the config of no family; use that of a family, such as "
        "BertConfig, or register a Family of your own with flax_transformers.register"
    )


DEFAULT_COMPUTE = ComputeConfig()


def build_model(config: TransformerConfig, compute: ComputeConfig = DEFAULT_COMPUTE) -> nn.Module:
    """The module of ``config.architecture``. Raises UserError, with the choices, for an unknown
    one."""
    family = family_of(config)
    kind = family.architectures.get(config.architecture)
    if kind is None:
        raise UserError(
            f"model.architecture is {ranges.shown(config.architecture)}, which is none of "
            f"{type(config).__name__}; choose among {', '.join(family.architectures)}"
        )
    return kind(config, compute) if family.parts is None else kind(config, compute, family.parts)


def family_of_architecture(name: str) -> Family:
    """The family that has an architecture, by its name of today."""
    return next(family for family in all_families() if name in family.architectures)


def family_of_json(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; see ``identify``."""
    return identify(config).family


def _names() -> dict[str, str]:
    """Every name of an architecture in lower case, older ones too, to that of today."""
    names = {name: name for family in all_families() for name in family.architectures}
    older = {old: new for family in all_families() for old, new in family.older_names.items()}
    return {name.lower(): own for name, own in (older | names).items()}


def _name_of_today(name: str) -> str | None:
    """Our name for an architecture: of any spelling (``LLaMAForCausalLM``), of an earlier release,
    or of TensorFlow's or Flax's class; None for one that is not supported."""
    lower = name.lower()
    tries = (lower, lower.removeprefix("tf"), lower.removeprefix("flax"))
    return next((_names()[each] for each in tries if each in _names()), None)


def _architecture_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"config.json has architectures {names!r:.80}; it must be a list of names, such as "
            '["BertForMaskedLM"]'
        )
    return names


@dataclass(frozen=True)
class Identity:
    """A family, and the content of a config.json under the names that the family has today."""

    family: Family
    wanted: dict[str, Any]
    """``architectures`` and ``model_type`` are those of the model to make."""
    own: dict[str, Any] | None
    """The same with the architecture of the file; None if that is none of ours."""


def identify(config: Mapping[str, Any], architecture: str | None = None) -> Identity:
    """The family and the architecture of a config.json.

    ``architecture``, if given, decides; else the first of ``architectures`` that is known; else
    ``model_type``, which means the family's usual architecture. Files of 2019 have neither.
    If the two name different types of one family, such as ``T5ForConditionalGeneration`` and
    "mt5", ``model_type`` decides, as in the Auto classes of transformers.
    Raises UserError, naming the line or the argument to add, if none of them is known, and for an
    ``architecture`` that contradicts a file whose names are known.
    """
    named = _architecture_names(config) or _timm_architecture(config)
    known = next(filter(None, map(_name_of_today, named)), None)
    model_type = config.get("model_type")
    typed = next((each for each in all_families() if model_type in each.model_types), None)
    if architecture is not None:
        wanted = _asked(architecture, known, model_type if typed else None)
        if not known and not typed and (named or model_type):
            log.warning(
                "config.json describes %s, which is not known here; it is read as %s, as asked",
                ", ".join(named) or model_type, wanted,
            )  # fmt: skip
    elif known:
        wanted = known = _of_type(known, model_type)
        if model_type not in (None, family_of_architecture(known).model_type(known)):
            raise UserError(
                f"config.json has model_type {ranges.shown(model_type)}, which does not "
                f"go with architecture {named[0]!r}; say with {_ARGUMENT} which of both it is"
            )
    elif named:
        raise UserError(_unknown(named[0], model_type, typed))
    elif typed:
        wanted = typed.from_huggingface(config).architecture
    else:
        raise UserError(_unnamed(model_type))
    family = family_of_architecture(wanted)
    changes = {"model_type": family.model_type(wanted)}
    if isinstance(model_type, str) and model_type in family.wholes:
        config = family.wholes[model_type](config)
    own = known if known or named else wanted
    if own not in family.architectures or (
        own is not None and family.model_type(own) != family.model_type(wanted)
    ):
        own = None
    return Identity(
        family,
        {**config, **changes, "architectures": [wanted]},
        None if own is None else {**config, **changes, "architectures": [own]},
    )


def _of_type(architecture: str, model_type: object) -> str:
    """The architecture of the same head and family that goes with a ``model_type``, if any."""
    family = family_of_architecture(architecture)
    head = architecture.lower().removeprefix(family.model_type(architecture).replace("-", ""))
    for name in family.architectures:
        own = family.model_type(name)
        if own == model_type and name.lower() == own.replace("-", "") + head:
            return name
    return architecture


def _timm_architecture(config: Mapping[str, Any]) -> list[str]:
    """The architecture of ours that a config.json of timm describes; none if it is not timm's."""
    name = config.get("architecture")
    if not isinstance(name, str) or "model_type" in config:
        return []
    families = [each for each in all_families() if each.timm_prefix]
    for family in families:
        if name.startswith(family.timm_prefix):
            return [next(iter(family.architectures))]
    raise UserError(
        f"config.json is timm's, for {name!r:.80}; of timm's models only those whose names begin "
        f"with {' or '.join(f.timm_prefix for f in families)} are read: for others give the model "
        "in the format of transformers"
    )


def _asked(architecture: str, known: str | None, model_type: str | None) -> str:
    """Our name for the architecture that the caller gave, checked against those of the file."""
    of_file = {} if known is None else {family_of_architecture(known).model_type(known): known}
    types = set(of_file) | ({model_type} if model_type else set())
    wanted = _name_of_today(architecture)
    if wanted is None or (types and not types & _types_with(wanted)):
        names = [
            name
            for family in all_families()
            for name in family.architectures
            if not types or types & _types_with(name)
        ]
        problem = "is not one of this family" if types else "is not supported"
        raise UserError(f"architecture {architecture!r} {problem}; choose among {', '.join(names)}")
    return wanted


def may_be_read_as(config: TransformerConfig, architecture: str) -> bool:
    """Whether the files of a model hold one of an ``architecture``, but for its heads."""
    family = family_of(config)
    if architecture in family.architectures:
        return True
    model_type = family.model_type(config.architecture)
    others = (one for one in all_families() if architecture in one.architectures)
    return any(model_type in (*one.model_types, *one.wholes) for one in others)


def _types_with(architecture: str) -> set[str]:
    """The model types whose files hold an architecture of ours."""
    family = family_of_architecture(architecture)
    return {family.model_type(architecture), *family.wholes}


def _unknown(name: str, model_type: object, typed: Family | None) -> str:
    if typed:
        choices = [n for n in typed.architectures if typed.model_type(n) == model_type]
        return (
            f"config.json names architecture {ranges.shown(name)}, which is not "
            f"supported; to read its layers as another {model_type} model, give {_ARGUMENT}: one "
            f"of {', '.join(choices)}"
        )
    return (
        f"config.json names architecture {ranges.shown(name)} (model_type "
        f"{ranges.shown(model_type)}), which is not supported; supported model types are "
        f"{', '.join(_model_types())}. If its layers are those of one of them, as of a renamed "
        f"Llama, give {_ARGUMENT}, such as LlamaForCausalLM; else register a Family of your own"
    )


def _model_types() -> list[str]:
    return sorted({kind for family in all_families() for kind in family.model_types})


def _unnamed(model_type: object) -> str:
    known = _model_types()
    if model_type is None:
        return (
            'config.json has neither "architectures" nor "model_type"; add a line that names the '
            'model, such as "architectures": ["BertForMaskedLM"], or give '
            f"{_ARGUMENT}; supported model types are {', '.join(known)}"
        )
    return (
        f"config.json has model_type {ranges.shown(model_type)}, which is not "
        f"supported; supported are {', '.join(known)}"
    )


ONLY_IN_TRAINING = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "drop_path",
    "classifier_dropout",
    "batch_norm",
    "init_std",
    "scaled_residual_init",
    "generator_divisor",  # of ELECTRA, whose two models are written one by one
}
"""Fields that may be lost on the way out: they do not change what a trained model computes."""


_OF_TOKENS = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForCausalLM")
"""Ends of names of architectures that read each token and pool nothing."""


def within_vocabulary(config: TransformerConfig) -> TransformerConfig:
    """The config without ids of a beginning, an end or padding that its vocabulary does not have,
    such as the defaults of GPT-2 in a smaller model."""
    size = getattr(getattr(config, "decoder", config), "vocab_size", None)
    changes: dict[str, Any] = {}
    if size is not None:
        bos, ends = getattr(config, "bos_id", None), getattr(config, "eos_ids", ())
        kept = tuple(i for i in ends if i < size)
        changes |= {"bos_id": None} if bos is not None and bos >= size else {}
        changes |= {"eos_ids": kept} if kept != ends else {}
        if getattr(config, "pad_id", -1) >= size:  # encoders need one, which changes no output
            changes["pad_id"] = -1 if getattr(config, "causal", False) else 0
    return replace(config, **changes) if changes else config


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model. Raises UserError if reading it would give another model."""
    family = family_of(config)
    if config.architecture in family.only_here:
        raise UserError(
            f"transformers has no class {config.architecture}, so there is nothing to write that "
            "it could load; keep this model in our own checkpoint format"
        )
    written = family.to_huggingface(config)
    read = family.from_huggingface(written)
    ignored = ONLY_IN_TRAINING | {"hub_fields", "generation"}  # which are written beside
    if config.architecture.endswith("ForQuestionAnswering"):
        ignored |= {"num_labels", "label_names"}  # its head has two outputs, whatever the file says
    is_text = isinstance(config, TextConfig)
    if is_text:  # sentence_files writes both for encoders, and other heads do not normalise
        ignored |= {"normalize_embeddings"}
    if is_text and config.architecture.endswith(("Model", *_OF_TOKENS)):
        ignored |= {"pooling"}
    for each in fields(config):
        ours, theirs = getattr(config, each.name), getattr(read, each.name)
        if isinstance(ours, TransformerConfig):  # of which the same fields may be lost
            lost = ONLY_IN_TRAINING & {field.name for field in fields(ours)}
            theirs = replace(theirs, **{name: getattr(ours, name) for name in lost})
        if ours != theirs and each.name not in ignored:
            bare = f"{config.architecture.partition('For')[0]}Model"
            encoder = is_text and each.name == "pooling"
            other = f"convert its encoder alone (--architecture {bare}), or " if encoder else ""
            raise UserError(
                f"model.{each.name} is {ours!r}, which {config.architecture} in Hugging Face "
                f"format cannot be; {other}keep this model in our own checkpoint format"
            )
    return with_kept(written, config, family.aliases, family.from_huggingface)


def published_sizes() -> dict[str, TransformerConfig]:
    """Every published size of every family by name, such as ``bert-base``."""
    return {name: config for family in all_families() for name, config in family.sizes.items()}
