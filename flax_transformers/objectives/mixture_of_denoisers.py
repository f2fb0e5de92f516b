"""Mixture of denoisers: UL2 (arXiv:2205.05131)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row
from flax_transformers.objectives.span_corruption import (
    NOISE_RANGES,
    corrupt,
    corrupted_lengths,
    enough_sentinels,
    row_lengths,
    span_counts,
    span_mask,
)
from flax_transformers.ranges import Ranges

Mode = Literal["R", "X", "S"]
MODES: tuple[Mode, ...] = ("R", "X", "S")
_SHORTEST = 16  # tokens of a row; below that no suffix is left to draw


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text, and what share of the examples gets it.

    ``mean_span`` None: the end of the text is cut out in one piece, its length drawn evenly around
    ``noise_density`` of the text (a prefix language model). Else as in span corruption.
    """

    mode: Mode
    noise_density: float
    mean_span: float | None
    share: float

    RANGES: ClassVar[Ranges] = {**NOISE_RANGES, "share": ranges.numbers(0, 1e6, above=True)}

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
"""The seven of the paper's table 1; regular, extreme and sequential ones 40 : 40 : 20 (§4.5)."""


@dataclass(frozen=True)
class MixtureOfDenoisers(SequenceLoss):
    """Span corruption of several kinds, one drawn for each example, with a token that says which.

    All kinds get windows of the same length: the longest with which the inputs of each fit into a
    row. The targets' width is that of the kind with the longest ones.
    """

    loss_name: ClassVar[str] = "mixture_of_denoisers"

    denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
    mode_ids: tuple[int, int, int] | None = None
    """Ids of the paper's [R], [X] and [S], which the inputs begin with; None: the last three of the
    tokenizer's sentinels."""
    roll: bool = True
    """As in `SpanCorruption`."""
    cross_documents: bool = True
    """Fill rows across document ends, or keep to one document a row."""

    RANGES: ClassVar[Ranges] = {"mode_ids": ranges.integers(0, 2**24)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.denoisers:
            raise ValueError("objective.denoisers is empty; give at least one Denoiser(...)")

    def window_spec(self, sequence_length: int) -> WindowSpec:
        return WindowSpec(
            self._lengths(sequence_length)[0], self.cross_documents, whole_sentences=False
        )

    def predictions(self, sequence_length: int) -> int:
        """Width of the targets, their end included."""
        return self._lengths(sequence_length)[1]

    def _lengths(self, sequence_length: int) -> tuple[int, int]:
        return _mixture_lengths(self.denoisers, sequence_length, int(self.roll))

    def frame(self, vocab: Vocabulary) -> Frame:
        """What a source ends with."""
        return Frame(after=(end_id(vocab),))

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row; see `encoder_decoder_row`."""
        tokens, (longest, width) = example["tokens"], self._lengths(sequence_length)
        mode_ids, sentinel_ids = self._mode_ids(vocab)
        sentinels = enough_sentinels(
            sentinel_ids,
            _most_spans(self.denoisers, longest) + self.roll,
            f"rows of {sequence_length} tokens and the densest denoiser",
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
        first_id = vocab.pad_id if self.decoder_start_id is None else self.decoder_start_id
        return encoder_decoder_row(inputs, targets, sequence_length, width, first_id, vocab.pad_id)

    def _mode_ids(self, vocab: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the modes, and the sentinels that are left."""
        if self.mode_ids is None:
            return vocab.sentinel_ids[-len(MODES) :], vocab.sentinel_ids[: -len(MODES)]
        if not 0 <= min(self.mode_ids) <= max(self.mode_ids) < vocab.size:
            raise UserError(
                f"objective.mode_ids are {self.mode_ids}, but the tokenizer has ids from 0 to "
                f"{vocab.size - 1}; choose three of these"
            )
        taken = set(self.mode_ids)
        return self.mode_ids, tuple(i for i in vocab.sentinel_ids if i not in taken)


@functools.lru_cache
def _cumulative_shares(denoisers: tuple[Denoiser, ...]) -> np.ndarray:
    shares = np.cumsum([denoiser.share for denoiser in denoisers])
    return shares[:-1] / shares[-1]


@functools.lru_cache
def _mixture_lengths(
    denoisers: tuple[Denoiser, ...], sequence_length: int, reserve: int
) -> tuple[int, int]:
    """How many tokens the inputs of every denoiser hold, and the widest targets of them."""
    if sequence_length < _SHORTEST:
        raise UserError(
            f"Rows of {sequence_length} tokens are too short for a mixture of denoisers; use "
            f"{_SHORTEST} or more."
        )
    room = sequence_length - 1  # the mode comes first
    spans = [(d.noise_density, d.mean_span) for d in denoisers if d.mean_span is not None]
    # A suffix can be cut out of a text of any length: the spans decide, if there are any.
    tokens = (
        min(row_lengths(room, density, mean_span, reserve)[0] for density, mean_span in spans)
        if spans
        else sequence_length
    )
    widths = [
        corrupted_lengths(tokens, density, mean_span)[1] + reserve for density, mean_span in spans
    ]
    for denoiser in denoisers:
        if denoiser.mean_span is None:
            widths.append(_suffix_range(tokens, denoiser.noise_density, sequence_length - 3)[1] + 2)
    return tokens, max(widths)


@functools.lru_cache
def _most_spans(denoisers: tuple[Denoiser, ...], tokens: int) -> int:
    spans = (
        1 if d.mean_span is None else span_counts(tokens, d.noise_density, d.mean_span)[1]
        for d in denoisers
    )
    return max(spans)


def _suffix_range(length: int, noise_density: float, room: int) -> tuple[int, int]:
    """Shortest and longest suffix to cut out of so many tokens, where ``room`` of them can stay.

    They lie evenly around ``noise_density * length``.
    """
    low = max(1, length - room)
    high = min(max(low, round(2 * noise_density * length) - low), length - 1)
    return min(low, high), high


def _suffix_mask(
    length: int, noise_density: float, room: int, rng: np.random.Generator
) -> np.ndarray:
    """True from a random place on: bool [length]. One token alone stays."""
    low, high = _suffix_range(length, noise_density, room)
    suffix = int(rng.integers(low, high + 1)) if high > 0 else 0
    return np.arange(length) >= length - suffix
