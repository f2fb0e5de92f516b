"""Mixture of denoisers: UL2 (arXiv:2205.05131)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, Rng, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row
from flax_transformers.objectives.span_corruption import (
    NOISE_RANGES,
    corrupt,
    corrupted_lengths,
    require_sentinels,
    row_lengths,
    span_counts,
    span_mask,
)

Mode = Literal["R", "X", "S"]
MODES: tuple[Mode, ...] = ("R", "X", "S")
_MIN_LENGTH = 16  # of a sequence; shorter ones leave no choice of suffixes


@dataclass(frozen=True)
class Denoiser:
    """A kind of corruption, and the share of examples that it is applied to."""

    mode: Mode
    """The token that the inputs begin with."""
    noise_density: float
    """Share of the tokens that is replaced."""
    mean_span: float | None
    """Mean number of tokens of a span, as in span corruption. None: the end of the text is replaced
    as one span (prefix language modelling), with a length drawn uniformly around
    ``noise_density``."""
    share: float
    """Share of the examples, relative to the sum of all shares."""

    RANGES: ClassVar[ranges.Ranges] = {**NOISE_RANGES, "share": ranges.numbers(0, 1e6, above=True)}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective.denoisers")


UL2_DENOISERS = (
    Denoiser("R", 0.15, 3.0, 0.2),
    Denoiser("R", 0.15, 8.0, 0.2),
    Denoiser("X", 0.5, 3.0, 0.1),
    Denoiser("X", 0.5, 8.0, 0.1),
    Denoiser("X", 0.15, 64.0, 0.1),
    Denoiser("X", 0.5, 64.0, 0.1),
    Denoiser("S", 0.25, None, 0.2),
)
"""The seven denoisers of table 1; regular, extreme, sequential 40 : 40 : 20 (section 4.5)."""


@dataclass(frozen=True)
class MixtureOfDenoisers(SequenceLoss):
    """Apply one of several denoisers, drawn for each example; the first input says which mode.

    Windows have the same length for all denoisers: the maximum for which the inputs of each fit,
    minus one for each document end inside, as in `SpanCorruption`. Targets have the length of the
    longest.

    Prompts get no mode by themselves: the text of a prompt begins with the token of one, and has a
    sentinel where text is missing. After mode [S] and a text, the first sentinel asks for the rest.
    """

    loss_name: ClassVar[str] = "mixture_of_denoisers"

    denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
    mode_ids: tuple[int, int, int] | None = None
    """Ids of the paper's [R], [X] and [S], with which the inputs begin. None: the last three
    sentinels of the tokenizer."""
    roll: bool = True
    """As in `SpanCorruption`."""
    cross_documents: bool = True
    """Fill sequences across document ends; else one document each."""

    RANGES: ClassVar[ranges.Ranges] = {"mode_ids": ranges.integers(0, 2**24)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.denoisers:
            raise ranges.OutOfRange("objective.denoisers is empty; give at least one Denoiser(...)")

    def window_spec(self, sequence_length: int) -> WindowSpec:
        length = self._lengths(sequence_length)[0]
        return WindowSpec(length, self.cross_documents, whole_sentences=False, sentence_ends=False)

    def predictions(self, sequence_length: int) -> int:
        """Length of the targets with their end."""
        return self._lengths(sequence_length)[1]

    def _lengths(self, sequence_length: int) -> tuple[int, int]:
        return _mixture_lengths(self.denoisers, sequence_length, int(self.roll))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare one example; see `encoder_decoder_row`."""
        tokens, (longest, target_length) = example["tokens"], self._lengths(sequence_length)
        mode_ids, sentinel_ids = self._mode_ids(vocab)
        sentinels = require_sentinels(
            sentinel_ids,
            _max_spans(self.denoisers, longest) + self.roll,
            f"sequences of {sequence_length} tokens and the densest denoiser",
        )
        chosen = int(np.searchsorted(_cumulative_shares(self.denoisers), rng.random(), "right"))
        denoiser = self.denoisers[chosen]
        if denoiser.mean_span is None:
            mask = _suffix_mask(len(tokens), denoiser.noise_density, sequence_length - 3, rng)
        else:
            mask = span_mask(
                len(tokens), denoiser.noise_density, denoiser.mean_span, rng, self.roll
            )
        inputs, targets = corrupt(tokens, mask, sentinels, end_id(vocab))
        inputs = np.concatenate([[mode_ids[MODES.index(denoiser.mode)]], inputs])
        lengths = sequence_length, target_length
        return encoder_decoder_row(inputs, targets, lengths, self.first_id(vocab), vocab)

    def _mode_ids(self, vocab: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the modes, and the other sentinels."""
        if self.mode_ids is None:
            return vocab.sentinel_ids[-len(MODES) :], vocab.sentinel_ids[: -len(MODES)]
        if not 0 <= min(self.mode_ids) <= max(self.mode_ids) < vocab.size:
            raise UserError(
                f"objective.mode_ids are {self.mode_ids}, but the tokenizer has ids from 0 to "
                f"{vocab.size - 1}; choose three of these"
            )
        return self.mode_ids, tuple(i for i in vocab.sentinel_ids if i not in self.mode_ids)


@functools.lru_cache
def _cumulative_shares(denoisers: tuple[Denoiser, ...]) -> np.ndarray:
    shares = np.cumsum([denoiser.share for denoiser in denoisers])
    return shares[:-1] / shares[-1]


@functools.lru_cache
def _mixture_lengths(
    denoisers: tuple[Denoiser, ...], sequence_length: int, reserve: int
) -> tuple[int, int]:
    """Number of tokens for which the inputs of all denoisers fit, and their longest targets."""
    if sequence_length < _MIN_LENGTH:
        raise UserError(
            f"sequences of {sequence_length} tokens are too short for a mixture of denoisers; use "
            f"{_MIN_LENGTH} or more"
        )
    limit = sequence_length - 1  # without the mode
    spans = [(d.noise_density, d.mean_span) for d in denoisers if d.mean_span is not None]
    # The end of a text of any length can be replaced: only the spans limit the number of tokens.
    tokens = (
        min(row_lengths(limit, density, mean_span, reserve)[0] for density, mean_span in spans)
        if spans
        else sequence_length
    )
    widths = [
        corrupted_lengths(tokens, density, mean_span)[1] + reserve for density, mean_span in spans
    ]
    for denoiser in denoisers:
        if denoiser.mean_span is None:
            density, kept = denoiser.noise_density, sequence_length - 3
            # Of windows with document ends, which are shorter, the longest end can be longer.
            widths.append(2 + max(_suffix_range(n, density, kept)[1] for n in range(tokens + 1)))
    return tokens, max(widths)


@functools.lru_cache
def _max_spans(denoisers: tuple[Denoiser, ...], tokens: int) -> int:
    spans = (
        1 if d.mean_span is None else span_counts(tokens, d.noise_density, d.mean_span)[1]
        for d in denoisers
    )
    return max(spans)


def _suffix_range(length: int, noise_density: float, kept: int) -> tuple[int, int]:
    """Minimum and maximum length of the end that is replaced if at most ``kept`` tokens are kept.

    Their mean is ``noise_density * length``.
    """
    low = max(1, length - kept)
    high = min(max(low, round(2 * noise_density * length) - low), length - 1)
    return min(low, high), high


def _suffix_mask(length: int, noise_density: float, kept: int, rng: Rng) -> np.ndarray:
    """True from a random position on: bool [length]. A single token is kept."""
    low, high = _suffix_range(length, noise_density, kept)
    suffix = int(rng.integers(low, high + 1)) if high > 0 else 0
    return np.arange(length) >= length - suffix
