"""From generation settings and arguments to the choice of tokens: sampling or beam search."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import jax

from flax_transformers.errors import UserError
from flax_transformers.generation.beams import Beams
from flax_transformers.generation.sampling import Sampling
from flax_transformers.models.generation_settings import (
    NO_SETTINGS,
    EarlyStopping,
    GenerationSettings,
)

log = logging.getLogger(__name__)

_TOP_K = 50
"""Default of ``top_k`` in transformers."""


def settings_of(model: Any) -> GenerationSettings:
    """The generation settings of a model's config."""
    settings: GenerationSettings = getattr(model.config, "generation", NO_SETTINGS)
    return settings


def choice_of(
    settings: GenerationSettings,
    key: jax.Array | None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: EarlyStopping | None = None,
) -> Sampling | Beams:
    """Each argument as given, else from the settings, else the default of transformers.

    Without a temperature, tokens are sampled if the settings have ``do_sample`` and there is a key,
    and no ``num_beams`` is given; otherwise the choice is the most probable token, or beam search
    with more than one beam. A warning names the settings that have no effect.

    Raises UserError for arguments out of range and for those that exclude each other.
    """
    draws = bool(settings.do_sample) and num_beams in (None, 1)
    if temperature is None and draws and key is not None:
        temperature = 1.0 if settings.temperature is None else settings.temperature
    if num_beams is not None and num_beams > 1 and temperature:
        raise UserError(
            f"beam search does not sample, and num_beams is {num_beams} and temperature "
            f"{temperature:g}; give one of the two"
        )
    beams = settings.num_beams if num_beams is None else num_beams
    _warn_of_settings(
        settings,
        drawing_without_key=draws and key is None,
        beams_while_drawing=bool(temperature) and num_beams is None and (beams or 1) > 1,
    )
    filters = (top_k, top_p, min_p)
    if beams not in (None, 1) and not temperature and all(given is None for given in filters):
        return _beams(settings, beams or 0, length_penalty, early_stopping)
    if length_penalty is not None or early_stopping is not None:
        raise UserError(
            "length_penalty and early_stopping apply to beam search only; give num_beams, such as 4"
        )
    if temperature:  # otherwise a given filter is refused
        if top_k is None:
            top_k = _TOP_K if settings.top_k is None else settings.top_k or None
        top_p = settings.top_p if top_p is None else top_p
        min_p = settings.min_p if min_p is None else min_p
    return Sampling(temperature=temperature or 0.0, top_k=top_k, top_p=top_p, min_p=min_p)


def _beams(
    settings: GenerationSettings,
    num_beams: int,
    length_penalty: float | None,
    early_stopping: EarlyStopping | None,
) -> Beams:
    if length_penalty is None:
        length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
    if early_stopping is None:
        early_stopping = settings.early_stopping or False
    return Beams(
        num_beams=num_beams,
        length_penalty=length_penalty,
        length_penalty_form=settings.length_penalty_form or "power",
        early_stopping=early_stopping,
    )


@lru_cache(maxsize=64)
def _warn_of_settings(
    settings: GenerationSettings, *, drawing_without_key: bool, beams_while_drawing: bool
) -> None:
    """Log, once, the settings that have no effect."""
    ignored = [f"{name} {value!r}" for name, value in settings.not_obeyed.items()]
    if drawing_without_key:
        ignored.append("do_sample True, because no random key is given")
    if beams_while_drawing:
        ignored.append(f"num_beams {settings.num_beams}, because tokens are sampled")
    if ignored:
        log.warning("generation settings without effect: %s", "; ".join(ignored))
