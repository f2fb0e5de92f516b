"""Generation settings of Hugging Face folders: generation_config.json or, in older folders,
config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flax_transformers import ranges
from flax_transformers.config_json import to_json
from flax_transformers.errors import UserError
from flax_transformers.huggingface import tensor_files
from flax_transformers.huggingface.family import family_of
from flax_transformers.models.config import EncoderDecoderConfig, TextConfig, TransformerConfig
from flax_transformers.models.generation_settings import (
    IN_CONFIG_JSON,
    NO_SETTINGS,
    OWN_FIELDS,
    GenerationSettings,
)
from flax_transformers.storage.paths import is_there

FILE = "generation_config.json"

_FORCED_END = {"bart": 2, "mbart": 2, "marian": 0}
"""Default of ``forced_eos_token_id`` in transformers."""


def writes_text(config: TransformerConfig) -> bool:
    """Whether the model generates text, so that transformers has settings for it."""
    kind = family_of(config).architectures.get(config.architecture)
    return hasattr(kind, "unembedding") and (
        isinstance(config, EncoderDecoderConfig) or getattr(config, "causal", False)
    )


def read_folder(
    folder: str | os.PathLike[str],
    config: TransformerConfig | None,
    described: Mapping[str, Any] | None = None,
) -> GenerationSettings:
    """The settings in a folder's generation_config.json, or in config.json if that is missing.

    ``described`` is the
    config.json if it was read already; ``config`` is the model's, None for any that writes text.
    Raises UserError for a file that is damaged and for a value of the wrong kind.
    """
    file = Path(folder) / FILE
    if is_there(file):
        return read_settings(tensor_files.read_json(file), file)
    if config is not None and not writes_text(config):
        return NO_SETTINGS
    file = Path(folder) / "config.json"
    if described is None:
        if not is_there(file):
            return NO_SETTINGS
        described = tensor_files.read_json(file)
    given = {
        name: value
        for name, value in described.items()
        if name in OWN_FIELDS | IN_CONFIG_JSON and value is not None
    }
    if described.get("force_bos_token_to_be_generated"):  # as files of 2020 spell it
        given.setdefault("forced_bos_token_id", described.get("bos_token_id", 0))
    default = _FORCED_END.get(str(described.get("model_type")))
    if default is not None and "forced_eos_token_id" not in described:
        given["forced_eos_token_id"] = default
    settings = read_settings(given, file)
    return settings if config is None else with_ids(settings, config)


def with_ids(settings: GenerationSettings, config: TransformerConfig) -> GenerationSettings:
    """The settings with missing ids of special tokens taken from the model's config."""
    if not isinstance(config, TextConfig):
        return settings
    ends: tuple[int, ...] = getattr(config, "eos_ids", ())
    known: dict[str, Any] = {
        "bos_token_id": getattr(config, "bos_id", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None if config.pad_id < 0 else config.pad_id,
        "decoder_start_token_id": getattr(config, "decoder_start_id", None),
    }
    missing: dict[str, Any] = {
        name: value for name, value in known.items() if getattr(settings, name) is None
    }
    return replace(settings, **missing)


def with_begin_and_end(
    settings: GenerationSettings, config: TransformerConfig, fields: Collection[str]
) -> GenerationSettings:
    """The settings, as far as they name such ids, with those of the ``fields`` "bos_id" and
    "eos_ids" of ``config``: with its begin id, and its end ids beside their own."""
    begin, ends = getattr(config, "bos_id", None), tuple(getattr(config, "eos_ids", ()))
    if "bos_id" in fields and settings.bos_token_id is not None and begin is not None:
        settings = replace(settings, bos_token_id=begin)
    if "eos_ids" in fields and settings.eos_ids:
        ends = tuple(dict.fromkeys((*ends, *settings.eos_ids)))
        settings = replace(settings, eos_token_id=ends[0] if len(ends) == 1 else ends)
    return settings


def settings_json(
    config: TransformerConfig, beside: str | os.PathLike[str] | None
) -> dict[str, Any] | None:
    """The generation_config.json of a model; None if it has none.

    These are the model's own settings, or those of the folder ``beside`` (its tokenizer's), or the
    ids in the config.
    """
    settings: GenerationSettings = getattr(config, "generation", NO_SETTINGS)
    prompt = settings.bidirectional_prompt  # of the run's objective, not of its config
    if replace(settings, bidirectional_prompt=None) == NO_SETTINGS:
        if beside is not None:
            settings = read_folder(beside, config)
        if writes_text(config):
            settings = with_ids(settings, config)
        settings = replace(settings, bidirectional_prompt=prompt)
    return None if settings == NO_SETTINGS else write_settings(settings)


def read_settings(given: Mapping[str, Any], source: object) -> GenerationSettings:
    """The settings in the fields of a file; ``source`` names it. Raises UserError for a field whose
    value is of the wrong kind or out of range."""
    known = {
        name: _as_tuples(value)
        for name, value in given.items()
        if name in OWN_FIELDS and value is not None and not _names_no_token(name, value)
    }
    if isinstance(known.get("stop_strings"), str):
        known["stop_strings"] = (known["stop_strings"],)
    other = tuple(
        (name, json.dumps(value)) for name, value in sorted(given.items()) if name not in OWN_FIELDS
    )
    try:
        return GenerationSettings(**known, other=other)
    except ranges.OutOfRange as error:
        fault = str(error).removeprefix("model.generation.")
        raise UserError(f"{source} cannot be used: {fault}") from None


def _names_no_token(name: str, value: Any) -> bool:
    """-1 instead of an id, as in the first conversions of LLaMA: there is no such token."""
    return name.endswith("token_id") and value == -1


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def write_settings(settings: GenerationSettings) -> dict[str, Any]:
    """The inverse of ``read_settings``; what is None is left out."""
    known = {
        field.name: to_json(getattr(settings, field.name))
        for field in fields(settings)
        if field.name != "other" and getattr(settings, field.name) is not None
    }
    return known | {name: json.loads(text) for name, text in settings.other}
