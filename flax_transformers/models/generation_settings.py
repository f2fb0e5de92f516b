"""Settings of text generation, as in generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from flax_transformers import ranges

Ids = int | tuple[int, ...]
EarlyStopping = bool | Literal["never"]
LengthPenaltyForm = Literal["power", "gnmt"]


NUM_BEAMS = ranges.integers(1, 1000)
LENGTH_PENALTY = ranges.numbers(-100, 100)

_WHOLE_NUMBERS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The fields of a generation_config.json, by their names there; None if not given.

    ``generate`` and ``generate_target`` follow those with a field here; ``not_obeyed`` names others
    that change outputs. ``length_penalty_form`` and ``bidirectional_prompt`` are this package's.
    """

    max_length: int | None = None
    """Largest number of tokens of prompt and output together."""
    max_new_tokens: int | None = None
    min_length: int | None = None
    """Smallest number of tokens of prompt and output together."""
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    """Sample tokens; otherwise take the most probable."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    num_beams: int | None = None
    """Number of beams; 1 for none."""
    length_penalty: float | None = None
    """Exponent of the length that scores of beam search are divided by."""
    length_penalty_form: LengthPenaltyForm | None = None
    """"power", as in transformers, or "gnmt" (arXiv:1609.08144, eq. 14); see ``Beams``."""
    early_stopping: EarlyStopping | None = None
    """When beam search ends; see ``Beams``."""
    renormalize_logits: bool | None = None
    """Normalise log-probabilities again after they were changed; only beams depend on it."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens that occurred before, and multiplies negative ones
    (arXiv:1909.05858 §4.1)."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens occurs twice; 0 for no limit."""
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    """Sequences that are never generated."""
    suppress_tokens: tuple[int, ...] | None = None
    """Tokens that are never generated."""
    begin_suppress_tokens: tuple[int, ...] | None = None
    """Tokens that are not generated first."""
    forced_bos_token_id: int | None = None
    """First generated token after a start of one token."""
    forced_eos_token_id: Ids | None = None
    """Last token if the length limit is reached."""
    stop_strings: tuple[str, ...] | None = None
    """Texts that end generation."""
    bos_token_id: int | None = None
    eos_token_id: Ids | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: Ids | None = None
    """First input of the decoder."""
    bidirectional_prompt: bool | None = None
    """The tokens of a prompt attend to each other both ways, as in prefix language models."""
    other: tuple[tuple[str, str], ...] = ()
    """All other fields of the file with their JSON text."""

    RANGES: ClassVar[ranges.Ranges] = {
        **dict.fromkeys(_WHOLE_NUMBERS, ranges.integers(0)),
        "temperature": ranges.numbers(0, 1e6),
        "top_p": ranges.numbers(0, 1e6),
        "min_p": ranges.SHARE,
        "num_beams": NUM_BEAMS,
        "length_penalty": LENGTH_PENALTY,
        "repetition_penalty": ranges.numbers(0, 1e6, above=True),
    }

    def __post_init__(self) -> None:
        # Configs saved by earlier versions have newer fields in ``other``.
        for name, text in self.other:
            if name in OWN_FIELDS and getattr(self, name) is None:
                value = json.loads(text)
                value = tuple(value) if isinstance(value, list) else value
                object.__setattr__(self, name, value)
        kept = tuple((name, text) for name, text in self.other if name not in OWN_FIELDS)
        object.__setattr__(self, "other", kept)
        ranges.check_fields(self, "model.generation")
        for name in ("stop_strings", "bad_words_ids"):
            if not all(getattr(self, name) or (True,)):
                raise ranges.OutOfRange(f"model.generation.{name} has an empty item; remove it")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end generation."""
        return _as_tuple(self.eos_token_id)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """Ids of which one is generated last if the length limit is reached."""
        return _as_tuple(self.forced_eos_token_id)

    @property
    def changes_logits(self) -> bool:
        """Whether any setting changes the logits."""
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
        """Settings that change outputs of transformers and are not supported here."""
        given = {name: json.loads(text) for name, text in self.other}
        return {
            name: given[name]
            for name, neutral in _NOT_OBEYED.items()
            if name in given and given[name] is not None and given[name] not in neutral
        }


NO_SETTINGS = GenerationSettings()

_NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
    "penalty_alpha": (0, 0.0),
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
    "max_time": (),
    "token_healing": (False,),
    "dola_layers": (),
    "num_return_sequences": (1,),
}
"""Unsupported fields that change outputs, with their neutral values."""

IN_CONFIG_JSON = frozenset({*_NOT_OBEYED, "remove_invalid_values"})
"""Generation settings without a field here that older folders have in config.json."""


OWN_FIELDS = frozenset(field.name for field in fields(GenerationSettings)) - {"other"}
"""The settings that have a field of their own."""


def _as_tuple(ids: Ids | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else ids
