"""Reading and writing fields of config.json that families share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, get_args

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.models.config import Activation, ProblemType, TransformerConfig

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TransformerConfig)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Hugging Face's names of activations, to ours; of several, the first is written."""


def activation_from(name: Any) -> Activation:
    """Our name for a ``hidden_act``. Raises UserError for an unsupported one."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json asks for activation {name!r}, which is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def activation_to(name: Activation) -> str:
    """Hugging Face's name for an activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def read_numbers(
    config: Mapping[str, Any], names: Mapping[str, str], defaults: object
) -> dict[str, Any]:
    """Numeric fields by our names. ``names`` maps ours to theirs.

    Older files leave out what is default: such a field is taken from ``defaults``. Raises UserError
    for a value that is not a number of the right kind, or is larger than the field may be.
    """
    numbers = {}
    for ours, theirs in names.items():
        default = getattr(defaults, ours)
        value = config.get(theirs, default)
        if value is None and default is None:
            continue
        require_number(theirs, value, whole=not isinstance(default, float))
        allowed = ranges.field_range(defaults, ours)
        if allowed is not None and value > allowed.most:  # before lists of as many layers are made
            raise UserError(
                f"config.json has {theirs} {ranges.shown(value)}; {allowed.fault(value)}"
            )
        numbers[ours] = value if default is None else type(default)(value)
    return numbers


def require_number(name: str, value: Any, *, whole: bool) -> None:
    """Raise UserError unless the field ``name`` is a finite number that is not negative.

    Configs check their narrower ranges when they are created.
    """
    fault = (ranges.integers(0) if whole else ranges.numbers()).fault(value)
    if fault:
        raise UserError(f"config.json has {name} {ranges.shown(value)}; {fault}")


def read_switches(
    config: Mapping[str, Any], names: Mapping[str, str], defaults: object
) -> dict[str, bool]:
    """Boolean fields, as ``read_numbers`` reads numbers.

    Raises UserError for anything else: a "no" or a 0 could be meant either way.
    """
    switches = {}
    for ours, theirs in names.items():
        value = config.get(theirs, getattr(defaults, ours))
        if not isinstance(value, bool):
            raise UserError(f"config.json has {theirs} {value!r}; it must be true or false")
        switches[ours] = value
    return switches


def write_fields(config: object, names: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of ``read_numbers`` and of ``read_switches``."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def without_aliases(config: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """A config.json with aliases that transformers also reads replaced by the family's own names,
    such as ``hidden_size`` by GPT-2's ``n_embd``; if both are present, the own name wins."""
    given = {own: config[alias] for alias, own in aliases.items() if alias in config}
    return given | dict(config)


def common_fields(config: Mapping[str, Any], defaults: TransformerConfig) -> dict[str, Any]:
    """Fields of every config.json: the architecture and the labels of a classifier."""
    fields: dict[str, Any] = {
        "architecture": (config.get("architectures") or [defaults.architecture])[0]
    }
    names, number = _label_names(config.get("id2label")), config.get("num_labels")
    if number is not None:
        require_number("num_labels", number, whole=True)
    if names is not None:
        if number not in (None, len(names)):
            logger.warning(
                "config.json has num_labels %s, but %s names in id2label; the names count",
                number, len(names),
            )  # fmt: skip
        fields["num_labels"] = len(names)
        if names != _unnamed(len(names)):
            fields["label_names"] = names
    elif number is not None:
        fields["num_labels"] = number
    fields["problem_type"] = config.get("problem_type")
    if fields["problem_type"] not in (None, *get_args(ProblemType)):
        raise UserError(
            f"config.json has problem_type {fields['problem_type']!r}; it must be one of "
            f"{', '.join(get_args(ProblemType))}"
        )
    return fields


def _label_names(labels: Any) -> tuple[str, ...] | None:
    """The names in ``id2label``, in order: a record from numbers to names (its keys are strings in
    JSON), from names to numbers, or a list. Names that are numbers become strings.

    None if there are none, empty if their order is not known. Raises UserError for anything else.
    """
    if not labels:
        return None
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping):
        raise UserError(
            f"config.json has id2label {labels!r:.80}; it must give a name to each number from 0 "
            'on, such as {"0": "no", "1": "yes"}'
        )
    keys, values = list(labels), list(labels.values())
    for numbers, names in ((keys, values), (values, keys)):
        order = _label_order(numbers)
        if order and all(isinstance(name, str | int | float) for name in names):
            return tuple(str(names[index]) for index in order)
    logger.warning(
        "config.json has id2label %.80s, which does not number names from 0 on; they are not used",
        labels,
    )
    return _unnamed(len(labels))


def _label_order(values: list[Any]) -> list[int] | None:
    """Index of each of 0, 1, 2 ... among ``values``; None if these are other values."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return order if [numbers[index] for index in order] == list(range(len(numbers))) else None


def common_json(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of ``common_fields``."""
    # The labels of a span are its first and its last token.
    spans = config.architecture.endswith("ForQuestionAnswering")
    names = _unnamed(2) if spans else config.label_names or _unnamed(config.num_labels)
    return {
        "architectures": [config.architecture],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        **({} if config.problem_type is None else {"problem_type": config.problem_type}),
    }


class _SpecialIds(Protocol):
    """A config with ids of special tokens; -1 means no padding token."""

    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...


def read_special_ids(config: Mapping[str, Any], defaults: _SpecialIds) -> dict[str, Any]:
    """Ids of padding, start and end tokens. Raises UserError for invalid ids."""
    no_padding = None if defaults.pad_id < 0 else defaults.pad_id
    pad, bos = config.get("pad_token_id", no_padding), config.get("bos_token_id", defaults.bos_id)
    eos = config.get("eos_token_id", list(defaults.eos_ids))
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    given = {"pad_token_id": [pad], "bos_token_id": [bos], "eos_token_id": ends}
    for name, values in given.items():
        for value in values:
            _require_id(name, value)
    return {"pad_id": -1 if pad is None else pad, "bos_id": bos, "eos_ids": ends}


def read_decoder_start(config: Mapping[str, Any], default: int | None) -> int | None:
    """The first input id of a decoder, if it is fixed. Raises UserError for an invalid id."""
    start = config.get("decoder_start_token_id", default)
    _require_id("decoder_start_token_id", start)
    return start


def _require_id(name: str, value: Any) -> None:
    fault = "" if value is None else ranges.TOKEN_ID.fault(value)
    if fault:
        raise UserError(f"config.json has {name} {ranges.shown(value)}; {fault}")


def write_special_ids(config: _SpecialIds) -> dict[str, Any]:
    """The inverse of ``read_special_ids``."""
    ends = config.eos_ids
    return {
        "pad_token_id": None if config.pad_id < 0 else config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
    }


def _unnamed(labels: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(labels))


def make_config(kind: type[C], fields: Mapping[str, Any]) -> C:
    """``kind(**fields)``. Raises UserError that names config.json for values it refuses."""
    try:
        return kind(**fields)
    except ValueError as error:
        raise UserError(f"config.json describes no {kind.__name__}: {error}") from None


def refuse_values(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError if ``config`` has a field with another value than in ``wanted``; 1 is not
    true."""
    for name, value in wanted.items():
        given = config.get(name, value)
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise UserError(
                f"config.json has {name} {config[name]!r}, which is not supported; "
                f"only {value!r} is"
            )


SIZE_NUMBERS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
"""The numbers of most families' sizes, as for ``read_numbers``."""

TEXT_NUMBERS = SIZE_NUMBERS | {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
"""Those of texts."""

CLASSIFIER_DROPOUT = {"classifier_dropout": "classifier_dropout"}


@dataclass(frozen=True, kw_only=True)
class JsonFields(Generic[C]):
    """A config.json as a table: the fields of a config, and what they are called there.

    A name's first half is ours, its second half theirs.
    """

    defaults: C
    """What a file means by fields that it leaves out; its class is that of the config."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Their fields for which only one value is supported; their ``model_type`` is written."""
    numbers: Mapping[str, str]
    nullable: Mapping[str, str] = field(default_factory=dict)
    """Numbers that may be null, which means the default; they are whole if that is."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Numbers that may be null, which means None; they are whole unless the default is not."""
    switches: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: {"activation": "hidden_act"})
    special_ids: bool = False
    """Whether it has ids of start and end tokens."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """As for ``without_aliases``."""

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of our config. Raises UserError for unsupported ones."""
        config = without_aliases(config, self.aliases)
        refuse_values(config, self.fixed)
        return common_fields(config, self.defaults) | self.own_fields(config)

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the table, without the architecture and the labels."""
        fields = read_numbers(config, self.numbers, self.defaults)
        fields |= read_switches(config, self.switches, self.defaults)
        if self.special_ids:
            fields |= read_special_ids(config, self.defaults)  # type: ignore[arg-type]
        for ours, theirs in self.nullable.items():
            fields[ours] = value = getattr(self.defaults, ours)
            if config.get(theirs) is not None:
                whole = isinstance(value, int)
                require_number(theirs, config[theirs], whole=whole)
                fields[ours] = (int if whole else float)(config[theirs])
        for ours, theirs in self.optional.items():
            given = config.get(theirs, getattr(self.defaults, ours)) is not None
            fields[ours] = None
            fields |= read_numbers(config, {ours: theirs} if given else {}, self.defaults)
        for ours, theirs in self.activations.items():
            default = activation_to(getattr(self.defaults, ours))
            fields[ours] = activation_from(config.get(theirs, default))
        return fields

    def read(self, config: Mapping[str, Any]) -> C:
        """Read a Hugging Face config.json. Raises UserError for unsupported fields."""
        return make_config(type(self.defaults), self.fields(config))

    def write(self, config: Any) -> dict[str, Any]:
        """The config.json that `transformers` reads."""
        return common_json(config) | self.own_json(config)

    def own_json(self, config: Any) -> dict[str, Any]:
        """The inverse of ``own_fields``."""
        if "classifier_dropout" in self.numbers:  # may not be null there
            config = replace(config, classifier_dropout=config.head_dropout)
        names = {**self.numbers, **self.nullable, **self.optional, **self.switches}
        activations = {
            theirs: activation_to(getattr(config, ours))
            for ours, theirs in self.activations.items()
        }
        return {
            **{name: value for name, value in self.fixed.items() if name == "model_type"},
            **activations,
            **write_fields(config, names),
            **(write_special_ids(config) if self.special_ids else {}),
        }


def model_type_of(config: Mapping[str, Any], prefixes: Mapping[str, str]) -> str:
    """The ``model_type`` of a config.json; by default that of its architecture, or the first.

    ``prefixes``: the family's model types, each with the prefix of its architectures' names.
    Raises UserError for another type, and for an architecture with another prefix.
    """
    architecture = (config.get("architectures") or [""])[0]
    named = [kind for kind, prefix in prefixes.items() if architecture.startswith(prefix)]
    model_type = config.get("model_type") or (named or list(prefixes))[0]
    if model_type not in prefixes:
        raise UserError(
            f"config.json has model_type {model_type!r}, which is not supported; only "
            f"{' and '.join(map(repr, prefixes))} are"
        )
    if architecture and not architecture.startswith(prefixes[model_type]):
        raise UserError(
            f"config.json has model_type {model_type!r}, which does not go with architecture "
            f"{architecture!r}; the names of its architectures begin with {prefixes[model_type]}"
        )
    return model_type
