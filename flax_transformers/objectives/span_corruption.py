"""Span corruption: T5 (arXiv:1910.10683 section 3.1.4) and, on bytes, ByT5 (arXiv:2105.13626).

Spans of tokens are replaced by one sentinel each; the targets are the sentinels, each followed by
the tokens of its span. Example, with sentinels X and Y:

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
from flax_transformers.objectives.base import (
    Arrays,
    Rng,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.rows import end_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row

BYT5_MEAN_SPAN = 20.0
"""Mean number of bytes of a span in ByT5 (arXiv:2105.13626 section 3.1)."""

NOISE_RANGES: ranges.Ranges = {
    "noise_density": ranges.numbers(0, 1, above=True, below=True),
    "mean_span": ranges.numbers(1, 2**20),
}


@dataclass(frozen=True)
class SpanCorruption(SequenceLoss):
    """Predict the spans that were replaced by sentinels.

    ``sequence_length`` is the length of the encoder's inputs. The lengths of windows and targets
    follow from it as in T5's own code: nothing is truncated, and a sequence from one document has
    no padding. There is no separator between the documents of a sequence, as in T5. Windows
    nevertheless count one position for each document end inside (`WindowSpec.length`): a sequence
    with k of them has k tokens fewer than fit, and about as much padding.
    """

    loss_name: ClassVar[str] = "span_corruption"

    noise_density: float = 0.15
    """Share of the tokens that is replaced, an exact count."""
    mean_span: float = 3.0
    """Mean number of tokens of a span; the number of spans is exact too."""
    roll: bool = True
    """Rotate the mask by a random offset, so that every token is replaced equally often. T5 does
    not: its masks begin with a kept token and end with a replaced one. A rotated mask can have one
    more span, for which one position is reserved."""
    cross_documents: bool = True
    """Fill sequences across document ends; else one document each."""

    RANGES: ClassVar[ranges.Ranges] = NOISE_RANGES

    def window_spec(self, sequence_length: int) -> WindowSpec:
        length = self._lengths(sequence_length)[0]
        return WindowSpec(length, self.cross_documents, whole_sentences=False, sentence_ends=False)

    def predictions(self, sequence_length: int) -> int:
        """Length of the targets with their end."""
        return self._lengths(sequence_length)[1]

    def _lengths(self, sequence_length: int) -> tuple[int, int]:
        return row_lengths(sequence_length, self.noise_density, self.mean_span, int(self.roll))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare one example; see `encoder_decoder_row`."""
        tokens, (longest, target_length) = example["tokens"], self._lengths(sequence_length)
        sentinels = require_sentinels(
            vocab.sentinel_ids,
            span_counts(longest, self.noise_density, self.mean_span)[1] + self.roll,
            f"sequences of {sequence_length} tokens, noise_density {self.noise_density} and "
            f"mean_span {self.mean_span}",
        )
        mask = span_mask(len(tokens), self.noise_density, self.mean_span, rng, self.roll)
        inputs, targets = corrupt(tokens, mask, sentinels, end_id(vocab))
        lengths = sequence_length, target_length
        return encoder_decoder_row(inputs, targets, lengths, self.first_id(vocab), vocab)


def span_counts(tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Number of replaced tokens out of ``tokens`` (at least 2), and number of their spans.

    At least one token is replaced and one is kept, and spans are not adjacent. (T5 computes its
    masks in float32 and its lengths in float64, as here: for some windows that are not full, its
    mask has one token more.)
    """
    noise = min(max(round(tokens * noise_density), 1), tokens - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, tokens - noise)


def corrupted_lengths(tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Lengths of the inputs and targets of ``tokens`` tokens, with their ends."""
    noise, spans = span_counts(tokens, noise_density, mean_span)
    return tokens - noise + spans + 1, noise + spans + 1


@functools.lru_cache
def row_lengths(
    inputs_length: int, noise_density: float, mean_span: float, reserve: int = 0
) -> tuple[int, int]:
    """Maximum number of tokens with inputs of ``inputs_length``, and the length of their targets.

    Without a ``reserve`` of spans, these are the numbers of T5's ``random_spans_helper``: 568 and
    114 for 512. Raises UserError if not even two tokens fit.
    """
    tokens = 2
    limit = inputs_length - reserve
    # The length of the inputs does not decrease with the number of tokens: bisection.
    low, high = tokens, max(tokens, int(inputs_length / (1.0 - noise_density)) + 2)
    while low < high:
        middle = (low + high + 1) // 2
        if corrupted_lengths(middle, noise_density, mean_span)[0] <= limit:
            low = middle
        else:
            high = middle - 1
    inputs, targets = corrupted_lengths(low, noise_density, mean_span)
    if inputs > limit:
        raise UserError(
            f"sequences of {inputs_length} tokens are too short for span corruption; "
            "use longer ones"
        )
    if noise_density == 0.5 and targets > inputs:  # as in T5: targets are not longer than inputs
        low, targets = low - 1, targets - 1
    return low, targets + reserve


def require_sentinels(sentinel_ids: tuple[int, ...], needed: int, where: str) -> np.ndarray:
    """The first ``needed`` sentinels. Raises UserError if there are fewer."""
    if len(sentinel_ids) < needed:
        raise UserError(
            f"{where} need {needed} sentinels, the tokenizer has {len(sentinel_ids)}; use shorter "
            "sequences, a lower noise density, longer spans, or a tokenizer with more sentinels "
            "(--data.tokenizer.sentinels)"
        )
    return np.array(sentinel_ids[:needed], np.int32)


def span_mask(
    length: int, noise_density: float, mean_span: float, rng: Rng, roll: bool
) -> np.ndarray:
    """Whether each token is replaced: bool [length] (T5's ``random_spans_noise_mask``).

    Kept and replaced spans alternate, a kept one first; all masks with these counts are equally
    likely. With ``roll``, the mask is then rotated by a random offset.
    """
    tokens = max(length, 2)
    noise, spans = span_counts(tokens, noise_density, mean_span)
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = _random_parts(tokens - noise, spans, rng)
    lengths[1::2] = _random_parts(noise, spans, rng)
    mask = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)[:length]
    if roll and length:
        by = int(rng.integers(length))
        mask = np.concatenate([mask[length - by :], mask[: length - by]])
    return mask


def _random_parts(total: int, parts: int, rng: Rng) -> np.ndarray:
    """Positive integers [parts] with the sum ``total``, all such tuples equally likely."""
    cuts = np.empty(parts + 1, np.int64)
    cuts[0], cuts[-1] = 0, total
    cuts[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False) + 1
    cuts.sort()
    return np.diff(cuts)


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets int32 of ``tokens`` [n], of which those in ``mask`` are replaced.

    The i-th span of them is replaced by the i-th sentinel in the inputs, and follows it in the
    targets. Both end with ``end``.
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
    is_token = np.ones(len(targets), bool)
    is_token[first + np.arange(spans)] = is_token[-1] = False
    targets[is_token] = cut
    targets[first + np.arange(spans)] = sentinels[:spans]
    targets[-1] = end
    return inputs, targets
