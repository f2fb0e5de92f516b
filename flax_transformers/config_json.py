"""Configs as JSON, with types named by stable ids.

``{"type": "masked_lm", "mask_fraction": 0.15, ...}``: types of this package have the short ids of
the table below, which do not change when a file is moved. A user's own type is named by module and
class, ``"my_module:MyObjective"``, and is created only if the user's config or program has
registered it: reading a checkpoint never imports code that the checkpoint names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flax_transformers.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the JSON of a run's config. Format 1 named types by module and class."""

_PACKAGE = __package__.partition(".")[0]
_FAMILIES = f"{_PACKAGE}.families"
_ENTRY_POINTS = "flax_transformers"

_TYPES = {
    "train_config": "training.config.TrainConfig",
    "phase": "training.config.Phase",
    "image_phase": "training.config.ImagePhase",
    "evaluation": "training.config.Evaluation",
    "evaluation_set": "data.base.EvaluationSet",
    "early_stopping": "checkpointing.config.EarlyStopping",
    "csv": "monitoring.trackers.Csv",
    "wandb": "monitoring.trackers.WeightsAndBiases",
    "mlflow": "monitoring.trackers.Mlflow",
    "trackio": "monitoring.trackers.Trackio",
    "logging": "training.config.Logging",
    "checkpoints": "checkpointing.config.CheckpointConfig",
    "ema": "optim.ema.EMAConfig",
    "lora": "adapters.lora.LoraConfig",
    "mesh": "parallel.mesh.MeshConfig",
    "limits": "parallel.limits.Limits",
    "compute": "models.config.ComputeConfig",
    # Optimizers.
    "adamw": "optim.optimizers.AdamW",
    "adafactor": "optim.optimizers.Adafactor",
    "lamb": "optim.optimizers.LAMB",
    "lars": "optim.optimizers.LARS",
    "lion": "optim.optimizers.Lion",
    "muon": "optim.optimizers.Muon",
    "schedule": "optim.schedules.Schedule",
    # Data.
    "text": "data.config.TextData",
    "mixed_text": "data.mixture.MixedText",
    "mixture_component": "data.mixture.Component",
    "images": "data.images.dataset.ImageData",
    "chat": "post_training.chat_data.ChatData",
    "conversation_source": "post_training.conversations.ConversationSource",
    "image_text": "data.images.image_text.ImageTextData",
    "signals": "data.signals.dataset.SignalData",
    "array_source": "data.signals.sources.ArraySource",
    "digits": "data.signals.sources.Digits",
    "embedded_bytes": "data.signals.sources.EmbeddedBytes",
    "moving_digits": "data.signals.generated.MovingDigits",
    "tones": "data.signals.generated.Tones",
    "solids": "data.signals.generated.Solids",
    "class_texts": "data.images.image_text.ClassTexts",
    "text_source": "data.sources.text.TextSource",
    "pair_source": "data.sources.pairs.PairSource",
    "labelled_source": "data.sources.labelled.LabelledSource",
    "tagged_source": "data.sources.conllu.TaggedSource",
    "question_source": "data.sources.squad.QuestionSource",
    "choice_source": "data.sources.labelled.ChoiceSource",
    "image_source": "data.images.kinds.ImageSource",
    "tokenizer": "data.tokenizers.load.TokenizerConfig",
    "filters": "data.prepare.filters.Filters",
    "augmentation": "data.images.augmentation.Augmentation",
    # Objectives.
    "masked_lm": "objectives.masked_lm.MaskedLM",
    "masking": "objectives.masked_lm.Masking",
    "next_sentence": "objectives.next_sentence.NextSentence",
    "sentence_order": "objectives.next_sentence.SentenceOrder",
    "replaced_token_detection": "objectives.replaced_tokens.ReplacedTokenDetection",
    "causal_lm": "objectives.causal_lm.CausalLM",
    "prefix_lm": "objectives.prefix_lm.PrefixLM",
    "span_corruption": "objectives.span_corruption.SpanCorruption",
    "denoiser": "objectives.mixture_of_denoisers.Denoiser",
    "mixture_of_denoisers": "objectives.mixture_of_denoisers.MixtureOfDenoisers",
    "denoising": "objectives.denoising.Denoising",
    "sequence_to_sequence": "objectives.sequence_to_sequence.SequenceToSequence",
    "sequence_classification": "objectives.sequence_classification.SequenceClassification",
    "token_classification": "objectives.token_classification.TokenClassification",
    "question_answering": "objectives.question_answering.QuestionAnswering",
    "multiple_choice": "multiple_choice.objective.MultipleChoice",
    "image_classification": "objectives.image_classification.ImageClassification",
    "distilled_images": "distillation.objectives.DistilledImageClassification",
    "distilled_sequences": "distillation.objectives.DistilledSequenceClassification",
    "masked_image": "objectives.masked_image.MaskedImage",
    "masked_video": "objectives.videos.MaskedVideo",
    "masked_modalities": "objectives.modalities.MaskedModalities",
    "modality_classification": "objectives.modalities.ModalityClassification",
    "video_classification": "objectives.videos.VideoClassification",
    "image_text_contrastive": "objectives.contrastive.ImageTextContrastive",
    "supervised_fine_tuning": "post_training.supervised.SupervisedFineTuning",
    "supervised_encoder_decoder": "post_training.supervised.SupervisedEncoderDecoder",
    "reward_model": "post_training.reward_model.RewardModel",
    "direct_preference": "post_training.preference.DirectPreference",
    # Reinforcement learning.
    "group_relative_policy": "post_training.reinforcement.policy.GroupRelativePolicy",
    "proximal_policy": "post_training.reinforcement.ppo.ProximalPolicy",
    "rollouts": "post_training.reinforcement.policy.Rollouts",
    "exact_answer": "post_training.reinforcement.rewards.ExactAnswer",
    "numeric_answer": "post_training.reinforcement.rewards.NumericAnswer",
    "matches_pattern": "post_training.reinforcement.rewards.MatchesPattern",
    "problems": "post_training.problems.Problems",
    "model_reward": "post_training.reinforcement.model_reward.ModelReward",
    "function_reward": "post_training.reinforcement.rewards.FunctionReward",
    # Models, and parts of their configs. The config of families.NAME.FAMILY has the id NAME.
    "clip_vision": "families.clip.ClipVision",
    "clip_text_model": "families.clip.ClipTextConfig",
    "clip_vision_model": "families.clip.ClipVisionConfig",
    "clip_classifier": "families.clip.ClipClassifierConfig",
    "grid_modality": "families.multimodal_mae.GridModality",
    "byte_modality": "families.multimodal_mae.ByteModality",
    "point_modality": "families.multimodal_mae.PointModality",
    "siglip_vision": "families.siglip.SiglipVision",
    "siglip_text_model": "families.siglip.SiglipTextConfig",
    "siglip_vision_model": "families.siglip.SiglipVisionConfig",
    "siglip_classifier": "families.siglip.SiglipClassifierConfig",
    "rope": "models.config.Rope",
    "batch_norm": "families._maps.BatchNormConfig",
    "generation_settings": "models.generation_settings.GenerationSettings",
}
"""Module and name of the types of this package, by id."""

_FORMER_IDS = {"execution": "compute"}
"""Former ids of types, by which older saved configs name them."""

FORMER_FIELDS = {
    "execution": "compute",
    "gates": "filters",
    "ledger": "example_log",
    "logits_held": "max_logits",
    "max_rewinds": "max_rollbacks",
    "max_skipped_in_a_row": "max_consecutive_skips",
    "norm_place": "norm_position",
    "rewinds": "rollbacks",
}
"""Former names of fields, which older saved configs may have."""

_FORMER_DEFAULTS = {"compute": {"dropout_generator": "threefry"}}
"""What versions without a field did, by type, where its default is something else."""

_FORMER_PLACES = {
    "models.config.Execution": "compute",
    "training.checkpoints.CheckpointConfig": "checkpoints",
    "training.average.WeightAverage": "ema",
    "training.optimizers.AdamW": "adamw",
    "training.optimizers.Adafactor": "adafactor",
    "training.optimizers.LAMB": "lamb",
    "training.optimizers.Lion": "lion",
    "training.schedules.Schedule": "schedule",
    "data.images.ImageData": "images",
    "data.text.TextSource": "text_source",
    "data.pairs.PairSource": "pair_source",
    "data.labelled.LabelledSource": "labelled_source",
    "data.conllu.TaggedSource": "tagged_source",
    "data.squad.QuestionSource": "question_source",
    "data.image_kinds.ImageSource": "image_source",
    "data.tokenizers.TokenizerConfig": "tokenizer",
    "data.gates.Gates": "filters",
    "data.augmentation.Augmentation": "augmentation",
    "models.positions.Rope": "rope",
}
"""Ids of types that format 1 knew in another file (``"training.old.Name": "name"``)."""

_IDS = {place: name for name, place in _TYPES.items()} | _FORMER_PLACES

_registered: dict[str, type] = {}
_finders: list[Callable[[str], type | None]] = []
_families: dict[str, Any] = {}
"""Registered families by the id of their config."""
T = TypeVar("T")


class UnregisteredType(UserError):
    """A saved config has a user's own type that is not registered."""

    def __init__(self, type_id: str, remedy: str = "") -> None:
        module, _, name = type_id.partition(":")
        super().__init__(
            f"the saved config uses {name} of the module {module}, which is not part of "
            "flax_transformers; "
            + (remedy or f"run the command in the folder of {module.replace('.', '/')}.py")
            + ", or call flax_transformers.register in a program of your own"
        )


def register(thing: T) -> T:
    """Register a dataclass of the user's own, or a ``Family``; also a class decorator.

    Saved configs can then have values of a registered dataclass, and models of a registered family
    are built, loaded and saved like those of this package. The types that a config file uses are
    registered when the file is loaded. Types and families of an installed package are registered by
    the entry-point group ``flax_transformers``, each entry naming one of them
    (``my_family = "my_package.my_module:FAMILY"``). Raises UserError for anything else.
    """
    if isinstance(thing, type) and dataclasses.is_dataclass(thing):
        _registered[type_id(thing)] = thing
    elif isinstance(config := getattr(thing, "config", None), type):  # a Family
        _families[type_id(register(config))] = thing
    else:
        raise UserError(f"{thing!r} cannot be registered; give a dataclass, or a Family")
    return thing


def registered_families() -> tuple[Any, ...]:
    """The families that were registered, those of installed packages too."""
    _load_entry_points_once()
    return tuple(_families.values())


@contextlib.contextmanager
def types_found_by(find: Callable[[str], type | None]) -> Iterator[None]:
    """Asks ``find`` for each user's own type that is not registered, by its id."""
    _finders.append(find)
    try:
        yield
    finally:
        _finders.remove(find)


def register_types_of(config: Any, name: str = "") -> None:
    """Registers every user-defined dataclass in a config.

    ``name``: that of a field, if ``config`` is its value. Raises UserError, naming the field, for a
    value that cannot be saved.
    """
    items: Iterable[tuple[object, Any]] = ()
    if isinstance(config, (list, tuple)):
        items = enumerate(config)
    elif isinstance(config, dict) and all(isinstance(key, str) for key in config):
        items = config.items()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        if not _is_ours(type(config)):
            register(type(config))
        items = _values(config).items()
    elif not isinstance(config, str | int | float | None):
        raise UserError(
            f"{name or 'the config'} is {config!r:.80}, which cannot be saved; use numbers, "
            "strings, None, dataclasses, and tuples or dicts (of string keys) of these"
        )
    for key, item in items:
        register_types_of(item, f"{name}.{key}" if name else str(key))


def _values(config: Any) -> dict[str, Any]:
    """What a dataclass is created from, by field."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def type_id(kind: type) -> str:
    """The id of a type in saved configs."""
    if not _is_ours(kind):
        return f"{_module_of(kind)}:{kind.__qualname__}"
    place = f"{kind.__module__}.{kind.__qualname__}".removeprefix(f"{_PACKAGE}.")
    family = kind.__module__.removeprefix(f"{_FAMILIES}.")
    if place not in _IDS and _config_of_family(family) is kind:
        return family
    if place not in _IDS:
        raise TypeError(f"{place} has no id; add one to the table of {__name__}")
    return _IDS[place]


def _config_of_family(name: str) -> type | None:
    """The config of the family in a file of this package; None if there is no such file."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    if importlib.util.find_spec(f"{_FAMILIES}.{name}") is None:
        return None
    config: type = importlib.import_module(f"{_FAMILIES}.{name}").FAMILY.config
    return config


def _module_of(kind: type) -> str:
    """The module by which other programs import a type; that of a program is named as for
    ``python -m``, or by its file."""
    if kind.__module__ != "__main__":
        return kind.__module__
    program = sys.modules["__main__"]
    if (spec := getattr(program, "__spec__", None)) is not None:
        return str(spec.name)
    return Path(getattr(program, "__file__", None) or "__main__").stem


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == _PACKAGE


def to_json(value: Any) -> Any:
    """A config as plain JSON, in which every dataclass has its ``type``, and a dict the type
    ``dict`` and its ``items``. Fields that are no arguments of a dataclass are left out.

    The config of a run also has the ``format``.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: to_json(item) for name, item in _values(value).items()}
        name = type_id(type(value))
        version = {"format": FORMAT} if name == "train_config" else {}
        return {"type": name} | version | fields
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {"type": "dict", "items": {key: to_json(item) for key, item in value.items()}}
    return value


def from_json(value: Any) -> Any:
    """The inverse of ``to_json``, for this format and all older ones.

    Raises UnregisteredType for a user's own type that was not registered, and UserError for
    a type, field or format that this version does not have.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    _check_format(value)
    if value.get("type") == "dict" and isinstance(value.get("items"), dict):
        return {key: from_json(item) for key, item in value["items"].items()}
    kind = _type_of(value.get("type"))
    computed = {field.name for field in dataclasses.fields(kind) if not field.init}
    read = from_json if _is_ours(kind) else _own_value
    saved = {key: read(item) for key, item in value.items() if key not in ("type", "format")}
    try:
        former = _FORMER_DEFAULTS.get(type_id(kind), {})
        named = former | current_names(kind, saved)
        return kind(**{key: item for key, item in named.items() if key not in computed})
    except UserError:  # a value that this version refuses; the message names the field
        raise
    except (TypeError, ValueError) as error:
        raise _unreadable(value.get("type"), error) from error


def _own_value(value: Any) -> Any:
    """A value of a user's own dataclass, of whose dicts older versions saved the items alone."""
    if isinstance(value, list):
        return tuple(map(_own_value, value))
    if isinstance(value, dict) and "type" not in value:
        return {key: _own_value(item) for key, item in value.items()}
    return from_json(value)


def current_names(kind: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved fields of a dataclass, by their current names."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {
        name if name in known else FORMER_FIELDS.get(name, name): value
        for name, value in saved.items()
    }


def _check_format(value: dict[str, Any]) -> None:
    found = value.get("format", 1)
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise UserError(
            f"the saved config has format {found!r}, and this version of flax_transformers reads "
            f"formats up to {FORMAT}; use the version that wrote it"
        )


def _type_of(name: Any) -> type:
    """The type with an id of this format or of an older one."""
    text = str(name)
    if text in _registered:
        return _registered[text]
    place = _TYPES.get(_FORMER_IDS.get(text, text))
    if place is None and text.startswith(f"{_PACKAGE}."):  # format 1
        place = _TYPES.get(_IDS.get(text.removeprefix(f"{_PACKAGE}."), ""))
    if place is None:
        family, _, former = text.removeprefix(f"{_FAMILIES}.").partition(".")
        config = _config_of_family(family)
        if config is not None and former in ("", config.__name__):
            return config
        if ":" in text and all(text.split(":", 1)):
            return _own_type(text)
        # Format 1 separated module and class of a user's own type by a dot.
        for type_id, kind in _registered.items():
            if type_id.replace(":", ".") == text:
                return kind
        raise _unreadable(name, "there is no such type")
    module, _, attribute = place.rpartition(".")
    kind = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), attribute)
    assert inspect.isclass(kind)
    return kind


def _own_type(name: str) -> type:
    """A type that an installed package offers as an entry point, or that a finder finds."""
    _load_entry_points()
    for find in _finders:
        if name not in _registered and (found := find(name)) is not None:
            _registered[name] = found
    found = _registered.get(name) or _registered_elsewhere(name)
    if found is None:
        raise UnregisteredType(name)
    return found


def _registered_elsewhere(name: str) -> type | None:
    """The only registered type of a name whose module was saved without its package, as older
    versions did for ``python -m``, or with one that this program runs without (``python
    pkg/train.py``), or as ``__main__``, as in a notebook."""
    module, _, kind = name.partition(":")
    ends = f":{kind}" if module == "__main__" else f".{name}"
    found = {
        other
        for type_id, other in _registered.items()
        if type_id.endswith(ends) or name.endswith(f".{type_id}")
    }
    return found.pop() if len(found) == 1 else None


def _load_entry_points() -> None:
    for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:  # another package's fault, which need not stop this run
            log.warning("entry point %s = %s is not registered: %s", entry.name, entry.value, error)


_load_entry_points_once = functools.cache(_load_entry_points)


def _unreadable(name: Any, reason: object) -> UserError:
    return UserError(
        f"the saved config names {name!r}, which this version of flax_transformers cannot read "
        f"({reason}); use the version that wrote it"
    )
