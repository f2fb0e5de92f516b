"""How a model writes text, as the generation_config.json beside its weights says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.ranges import Ranges

Ids = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The fields of a generation_config.json, by their names there; None where it has none.

    Those with a field of their own here are obeyed by ``generate`` and ``generate_target``, except
    for the ones that ``not_obeyed`` names.
    """

    max_length: int | None = None
    """Tokens of prompt and text together, at most."""
    max_new_tokens: int | None = None
    min_length: int | None = None
    """Tokens of prompt and text together before the end may be written."""
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    """Draw tokens; otherwise the likeliest is taken."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    """Logits of tokens that are there already are divided by this if positive, else multiplied
    (arXiv:1909.05858 §4.1)."""
    no_repeat_ngram_size: int | None = None
    """No sequence of so many tokens is written twice; 0 for no limit."""
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    """Sequences that are never written."""
    suppress_tokens: tuple[int, ...] | None = None
    """Tokens that are never written."""
    begin_suppress_tokens: tuple[int, ...] | None = None
    """Tokens that are not written first."""
    forced_bos_token_id: int | None = None
    """What is written first after a beginning of one token."""
    forced_eos_token_id: Ids | None = None
    """What is written last where the limit is reached."""
    bos_token_id: int | None = None
    eos_token_id: Ids | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: Ids | None = None
    """What a decoder's text begins with."""
    other: tuple[tuple[str, str], ...] = ()
    """Every other field of the file and its JSON text, kept as it is."""

    RANGES: ClassVar[Ranges] = {
        "temperature": ranges.numbers(0, 1e6),
        "repetition_penalty": ranges.numbers(0, 1e6, above=True),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "model.generation")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""
        return _as_tuple(self.eos_token_id)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """Ids of which one is written last where the limit is reached."""
        return _as_tuple(self.forced_eos_token_id)

    @property
    def changes_logits(self) -> bool:
        """Whether any setting changes logits before a token is chosen."""
        return bool(
            self.repetition_penalty not in (None, 1.0)
            or self.no_repeat_ngram_size
            or self.bad_words_ids
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.min_length
            or self.min_new_tokens
            or self.forced_bos_token_id is not None
            or self.forced_eos_ids
        )

    @property
    def not_obeyed(self) -> dict[str, Any]:
        """Settings that change what transformers writes and that are not obeyed here."""
        given = {name: json.loads(text) for name, text in self.other}
        return {
            name: given[name]
            for name, neutral in _NOT_OBEYED.items()
            if name in given and given[name] is not None and given[name] not in neutral
        }


NO_SETTINGS = GenerationSettings()

_NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
    "penalty_alpha": (0, 0.0),
    "min_p": (0, 0.0),
    "top_h": (),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
    "forced_decoder_ids": (),
    "stop_strings": (),
    "max_time": (),
    "token_healing": (False,),
    "dola_layers": (),
    "num_return_sequences": (1,),
}
"""Fields that change what is written and are not obeyed here, with the values that change nothing.
``length_penalty`` and ``early_stopping`` matter to beams alone."""

IN_CONFIG_JSON = frozenset(
    {
        *_NOT_OBEYED,
        "early_stopping",
        "length_penalty",
        "remove_invalid_values",
        "renormalize_logits",
    }
)
"""Generation settings, beside those with a field of their own, that older files have in config.json
alone."""


def read_settings(given: Mapping[str, Any], source: object) -> GenerationSettings:
    """The settings in the fields of a file; ``source`` names it. Raises UserError for a field whose
    value is of the wrong kind."""
    known: dict[str, Any] = {}
    for name, read in _READERS.items():
        if given.get(name) is not None:
            try:
                known[name] = read(given[name])
            except _WrongKind as error:
                raise UserError(
                    f"{source} has {name} {given[name]!r}; it must be {error}"
                ) from None
    other = tuple(
        (name, json.dumps(value)) for name, value in sorted(given.items()) if name not in _READERS
    )
    return GenerationSettings(**known, other=other)


def write_settings(settings: GenerationSettings) -> dict[str, Any]:
    """The inverse of ``read_settings``; what is None is left out."""
    known = {
        field.name: _as_json(getattr(settings, field.name))
        for field in fields(settings)
        if field.name != "other" and getattr(settings, field.name) is not None
    }
    return known | {name: json.loads(text) for name, text in settings.other}


def _as_tuple(ids: Ids | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else ids


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


class _WrongKind(Exception):
    """The message says what is expected."""


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _WrongKind("true or false")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise _WrongKind("a number that is whole, not negative and below 2**31")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _WrongKind("a number that is finite and not negative")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) == 0:
        raise _WrongKind("a number above 0")
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _WrongKind("a list of ids")
    return tuple(map(_whole, value))


def _id_or_ids(value: Any) -> Ids:
    return _ids(value) if isinstance(value, list | tuple) else _whole(value)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _WrongKind("a list of lists of ids")
    if not all(words := tuple(map(_ids, value))):
        raise _WrongKind("a list of lists of ids, none of them empty")
    return words


_READERS: dict[str, Callable[[Any], Any]] = {
    "max_length": _whole,
    "max_new_tokens": _whole,
    "min_length": _whole,
    "min_new_tokens": _whole,
    "do_sample": _switch,
    "temperature": _number,
    "top_k": _whole,
    "top_p": _number,
    "repetition_penalty": _positive,
    "no_repeat_ngram_size": _whole,
    "bad_words_ids": _words,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "forced_bos_token_id": _whole,
    "forced_eos_token_id": _id_or_ids,
    "bos_token_id": _whole,
    "eos_token_id": _id_or_ids,
    "pad_token_id": _whole,
    "decoder_start_token_id": _id_or_ids,
}

OWN_FIELDS = frozenset(_READERS)
"""The settings that have a field of their own."""
