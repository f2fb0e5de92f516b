"""How a model writes text, as the generation_config.json beside its weights says."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from flax_transformers import ranges
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


OWN_FIELDS = frozenset(field.name for field in fields(GenerationSettings)) - {"other"}
"""The settings that have a field of their own."""


def _as_tuple(ids: Ids | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else ids
