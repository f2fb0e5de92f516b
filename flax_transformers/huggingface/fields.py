"""Reading and writing fields of config.json that families share.

A family's ``to_huggingface`` writes every field that it reads. Other fields of a file are written
back unchanged if they do not affect the outputs, refused if they do, and written back with a
warning if they are unknown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, get_args

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.models.config import Activation, ProblemType, TransformerConfig
from flax_transformers.models.generation_settings import IN_CONFIG_JSON, OWN_FIELDS

log = logging.getLogger(__name__)

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
            log.warning(
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
    log.warning(
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

    Tables map our field names to those of config.json.
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
        """The inverse of ``own_fields``. Raises UserError for a limit of positions of None."""
        if "classifier_dropout" in self.numbers and config.classifier_dropout is None:
            config = replace(config, classifier_dropout=config.dropout)  # may not be null there
        theirs = self.numbers.get("max_positions")
        if theirs and config.max_positions is None and self.defaults.max_positions is not None:
            raise UserError(
                f"model.max_positions is None, but the config.json of {config.architecture} needs "
                f"a number as {theirs}; set model.max_positions to the length of its longest "
                "sequences"
            )
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


_HARMLESS = frozenset(
    # Origin of a model, how it was run, and what it returns.
    "_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset auto_map "
    "attn_implementation transformers_version finetuning_task language base_model_tp_plan "
    "use_cache output_attentions output_hidden_states output_scores output_past return_dict "
    "return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss xla_device dtype torch_dtype "
    "gradient_checkpointing chunk_size_feed_forward pretraining_tp reference_compile is_decoder "
    "deterministic_flash_attn repad_logits_with_grad is_encoder_decoder tokenizer_class "
    "use_return_dict quantization_config directionality model_max_length unsloth_version "
    # Read by pipelines and tokenizers.
    "task_specific_params prefix label2id id2label num_labels _num_labels sep_token_id "
    "cls_token_id mask_token_id unk_token_id tokenizer_type "
    # Training only.
    "decoder_layerdrop encoder_layerdrop classif_dropout classifier_dropout hidden_dropout "
    "output_router_logits sparse_prediction sparse_pred_ignore_index initializer_cutoff_factor "
    "initializer_range initializer_factor summary_first_dropout keys_to_ignore_at_inference "
    "embd_pdrop qa_dropout summary_last_dropout sinusoidal_pos_embds "
    # Of unsupported heads.
    "n_special predict_special_tokens scalable_attention text_config text_config_dict "
    "logit_scale_init_value projection_dim "
    "summary_activation summary_proj_to_labels summary_type summary_use_proj encoder_stride "
    "pooler_act pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
    "pooler_output_size pooler_size_per_head pooler_type pooler_dropout pooler_hidden_size "
    # Redundant sizes, and fields that the originals do not read.
    "n_ctx n_positions vocab_size_or_config_json_file layer_norm_eps position_embedding_type "
    "embedding_size add_bias_logits add_final_layer_norm normalize_before normalize_embedding "
    "down_scale_factor gap_size net_structure_type num_memory_blocks "
    "static_position_embeddings extra_pos_embeddings hidden_activation sliding_window "
    "do_blenderbot_90_layernorm eos_token_ids max_sequence_length replacing_rate save_step "
    "global_attn_every_n_layers global_rope_theta local_rope_theta max_window_layers "
    "scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn "
    "add_cross_attention cross_attention_hidden_size tie_encoder_decoder feed_forward_proj "
    "rope_scaling rope_theta rope_parameters partial_rotary_factor router_jitter_noise "
    "original_max_position_embeddings use_bidirectional_attention decoder_vocab_size "
    "attention_head_size conv_act conv_groups".split()
) | {"pruned_heads", "force_bos_token_to_be_generated"}
"""Fields that do not change outputs, or that a family checks before."""


_WRITTEN_ANYWAY = {"dtype", "architectures", "model_type"}


def kept_fields(
    described: Mapping[str, Any], written: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """The fields of the config.json ``described`` that differ from ``written``, for ``hub_fields``.

    ``written`` is what the family writes of the model: "silu" for "swish". A warning names
    unknown fields. Raises UserError for fields that change the outputs.
    """
    if described.get("pruned_heads"):
        raise UserError(
            f"config.json has pruned_heads {described['pruned_heads']!r}, and models with some of "
            "their heads removed are not supported; choose the model before pruning"
        )
    known = written.keys() | _HARMLESS | OWN_FIELDS | IN_CONFIG_JSON | aliases.keys()
    if unknown := sorted(name for name in described.keys() - known if described[name] is not None):
        log.warning(
            "config.json has fields that are not known here: %s; they are written back as they "
            "are, and change nothing that the model computes here",
            ", ".join(unknown),
        )
    kept = {
        name: json.dumps(value)
        for name, value in described.items()
        if name not in _WRITTEN_ANYWAY and not (name in written and written[name] == value)
    }
    return tuple(sorted(kept.items()))


def with_kept(
    written: Mapping[str, Any],
    config: TransformerConfig,
    aliases: Mapping[str, str],
    read: Callable[[Mapping[str, Any]], TransformerConfig],
) -> dict[str, Any]:
    """The config.json that a family writes, with the ``hub_fields`` of the config.

    If the model is unchanged, all are written as they were. Otherwise the family's values win, and
    aliases follow them. ``read`` is
    the family's reader.
    """
    kept = {name: json.loads(text) for name, text in config.hub_fields}
    if _of_other_labels(kept, written):
        del kept["label2id"]
    for name in kept:
        if name in aliases:
            kept[name] = written[aliases[name]]
        elif name in ("num_labels", "_num_labels") and "id2label" in written:
            kept[name] = len(written["id2label"])
    if kept and read({**written, **kept}) == read(written):
        return {**written, **kept}
    return {**kept, **written}


def _of_other_labels(kept: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether a "label2id" that was kept, whose numbers may be strings, is not of these labels."""
    if "label2id" not in kept or "id2label" in kept:  # readers compare "id2label"
        return False
    try:
        numbers = {name: int(number) for name, number in kept["label2id"].items()}
    except (AttributeError, TypeError, ValueError):
        return True
    return numbers != written.get("label2id")
