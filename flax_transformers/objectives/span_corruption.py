"""Span corruption: T5 (arXiv:1910.10683 §3.1.4) and, on bytes, ByT5 (arXiv:2105.13626).

Spans of tokens are cut out and a sentinel takes the place of each; the targets are the sentinels,
each followed by what it stands for. Example, with sentinels X and Y:

    tokens   Thank you for inviting me to your party last week
    inputs   Thank you X me to your party Y week </s>
    targets  X for inviting Y last </s>
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row
from flax_transformers.ranges import Ranges

BYT5_MEAN_SPAN = 20.0
"""Mean length of a span of bytes in ByT5 (arXiv:2105.13626 §3.1)."""

NOISE_RANGES: Ranges = {
    "noise_density": ranges.numbers(0, 1, above=True, below=True),
    "mean_span": ranges.numbers(1, 2**20),
}


@dataclass(frozen=True)
class SpanCorruption(SequenceLoss):
    """Restore the spans that sentinels stand for.

    Rows of ``sequence_length`` are the encoder's. How much text goes into them and how wide the
    targets are follows as in T5's own code: nothing is cut off and a full row has no padding.
    Documents follow one another in a row without a sign between them, as there.
    """

    loss_name: ClassVar[str] = "span_corruption"

    noise_density: float = 0.15
    """Share of the tokens that is cut out, an exact count."""
    mean_span: float = 3.0
    """Mean length of what is cut out at a time; the number of spans is exact too."""
    roll: bool = True
    """Turn the mask round by a random number of places, so that every token is cut out equally
    often. T5 did not: its masks start with a kept token and end with a cut one. A turned mask can
    have one span more, for which rows hold one place in reserve."""
    cross_documents: bool = True
    """Fill rows across document ends, or keep to one document a row."""

    RANGES: ClassVar[Ranges] = NOISE_RANGES

    def window_spec(self, sequence_length: int) -> WindowSpec:
        return WindowSpec(
            self._lengths(sequence_length)[0], self.cross_documents, whole_sentences=False
        )

    def predictions(self, sequence_length: int) -> int:
        """Width of the targets, their end included."""
        return self._lengths(sequence_length)[1]

    def _lengths(self, sequence_length: int) -> tuple[int, int]:
        return row_lengths(sequence_length, self.noise_density, self.mean_span, int(self.roll))

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
        sentinels = enough_sentinels(
            vocab.sentinel_ids,
            span_counts(longest, self.noise_density, self.mean_span)[1] + self.roll,
            f"rows of {sequence_length} tokens, noise_density {self.noise_density} and mean_span "
            f"{self.mean_span}",
        )
        mask = span_mask(len(tokens), self.noise_density, self.mean_span, rng, self.roll)
        inputs, targets = corrupt(tokens, mask, sentinels, end_id(vocab))
        first_id = vocab.pad_id if self.decoder_start_id is None else self.decoder_start_id
        return encoder_decoder_row(inputs, targets, sequence_length, width, first_id, vocab.pad_id)


def span_counts(tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """How many of so many tokens (at least 2) are cut out, and in how many spans.

    At least one of both kinds stays, and the spans never touch. (T5's mask multiplies in float32,
    its lengths in float64 as here: for some windows that are not full its mask has a token more.)
    """
    noise = min(max(round(tokens * noise_density), 1), tokens - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, tokens - noise)


def corrupted_lengths(tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Lengths of inputs and targets made of so many tokens, the ends included."""
    noise, spans = span_counts(tokens, noise_density, mean_span)
    return tokens - noise + spans + 1, noise + spans + 1


@functools.lru_cache
def row_lengths(
    inputs_length: int, noise_density: float, mean_span: float, reserve: int = 0
) -> tuple[int, int]:
    """How many tokens give inputs of at most ``inputs_length``, and the length of their targets.

    Without a ``reserve`` of spans these are the numbers of T5's ``random_spans_helper``: 568 and
    114 for 512. Raises UserError where there is no room for two tokens.
    """
    tokens = 2
    room = inputs_length - reserve
    # More tokens never make shorter inputs, so the last count that fits is found by halving.
    low, high = tokens, max(tokens, int(inputs_length / (1.0 - noise_density)) + 2)
    while low < high:
        middle = (low + high + 1) // 2
        if corrupted_lengths(middle, noise_density, mean_span)[0] <= room:
            low = middle
        else:
            high = middle - 1
    inputs, targets = corrupted_lengths(low, noise_density, mean_span)
    if inputs > room:
        raise UserError(
            f"Rows of {inputs_length} tokens are too short for span corruption; use longer "
            "sequences."
        )
    if noise_density == 0.5 and targets > inputs:  # T5's targets are no longer than the inputs
        low, targets = low - 1, targets - 1
    return low, targets + reserve


def enough_sentinels(sentinel_ids: tuple[int, ...], needed: int, where: str) -> np.ndarray:
    """The first ``needed`` sentinels; UserError if there are not so many."""
    if len(sentinel_ids) < needed:
        raise UserError(
            f"{where} need {needed} sentinels, the tokenizer has {len(sentinel_ids)}; use shorter "
            "sequences, a lower noise density, longer spans, or a tokenizer with more sentinels "
            "(--data.tokenizer.sentinels)"
        )
    return np.array(sentinel_ids[:needed], np.int32)


def span_mask(
    length: int, noise_density: float, mean_span: float, rng: np.random.Generator, roll: bool
) -> np.ndarray:
    """True at tokens that are cut out: bool [length].

    Kept and cut stretches alternate, a kept one first; all masks with these counts are equally
    likely. With ``roll`` it is then turned round by any number of places. (T5's
    ``random_spans_noise_mask``.)
    """
    tokens = max(length, 2)
    noise, spans = span_counts(tokens, noise_density, mean_span)
    stretches = np.empty(2 * spans, np.int64)
    stretches[0::2] = _random_parts(tokens - noise, spans, rng)
    stretches[1::2] = _random_parts(noise, spans, rng)
    mask = np.repeat(np.arange(2 * spans) % 2 == 1, stretches)[:length]
    if roll and length:
        by = int(rng.integers(length))
        mask = np.concatenate([mask[length - by :], mask[: length - by]])
    return mask


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Positive integers [parts] that add up to ``total``, each such row equally likely."""
    cuts = np.empty(parts + 1, np.int64)
    cuts[0], cuts[-1] = 0, total
    cuts[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False) + 1
    cuts.sort()
    return np.diff(cuts)


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets int32 of ``tokens`` [n]; those where ``mask`` is True are cut out.

    The i-th stretch of them becomes the i-th sentinel in the inputs, and comes after it in the
    targets. Both finish with ``end``.
    """
    begins = mask.copy()
    begins[1:] &= ~mask[:-1]
    spans = int(np.count_nonzero(begins))
    inputs = np.empty(len(tokens) - int(np.count_nonzero(mask)) + spans + 1, np.int32)
    marked = tokens.astype(np.int32)
    marked[begins] = sentinels[:spans]
    inputs[:-1] = marked[~mask | begins]
    inputs[-1] = end

    cut = tokens[mask]
    first = np.flatnonzero(begins[mask])
    targets = np.empty(len(cut) + spans + 1, np.int32)
    place = np.ones(len(targets), bool)
    place[first + np.arange(spans)] = place[-1] = False
    targets[place] = cut
    targets[first + np.arange(spans)] = sentinels[:spans]
    targets[-1] = end
    return inputs, targets
