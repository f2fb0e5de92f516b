"""Denoising (BART, arXiv:1910.13461 section 2.2): restore a text from a corrupted copy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, Frame, Rng, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id, start_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row


@dataclass(frozen=True)
class Denoising(SequenceLoss):
    """Restore a text after sentence permutation, infilling, masking, deletion and rotation.

    They are applied in this order; the defaults are those of the paper's large model (section 4:
    infilling and permutation). Shares are exact counts of the tokens of a document. A sequence is
    one document or a part of it, between BOS and EOS, which are never corrupted. The first input
    of the decoder is EOS.
    """

    loss_name: ClassVar[str] = "denoising"

    infill_share: float = 0.3
    """Share of tokens in spans, each replaced by one [MASK]; an empty span inserts a [MASK]."""
    mean_span: float = 3.0
    """Mean of the Poisson distribution of the lengths of spans."""
    permute_sentences: bool = True
    """Shuffle the sentences."""
    mask_share: float = 0.0
    """Share of tokens that are replaced by [MASK]."""
    delete_share: float = 0.0
    """Share of tokens that are deleted."""
    rotate: bool = False
    """Rotate the text, so that it begins at a random token."""
    cross_documents: bool = False
    """Fill sequences with several documents, each corrupted separately and followed by EOS. BART
    has one document in a sequence, which leaves sequences of short documents mostly empty."""

    RANGES: ClassVar[ranges.Ranges] = {
        "infill_share": ranges.RATE,
        "mean_span": ranges.numbers(0, 100, above=True),
        "mask_share": ranges.RATE,
        "delete_share": ranges.RATE,
    }

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # BOS and EOS take two positions.
        return WindowSpec(sequence_length - 2, self.cross_documents)

    def predictions(self, sequence_length: int) -> int:
        """Length of the targets."""
        return sequence_length

    def frame(self, vocab: Vocabulary) -> Frame:
        """Special tokens around an input of the encoder."""
        begin = start_id(vocab)
        return Frame(() if begin is None else (begin,), (end_id(vocab),))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare one example; see `encoder_decoder_row`."""
        if vocab.mask_id is None:
            raise UserError("the tokenizer has no [MASK], which denoising needs; choose another")
        end = end_id(vocab)
        tokens, sentence_ends = example["tokens"], example["sentence_ends"]
        corrupted: list[np.ndarray | list[int]] = [list(self.frame(vocab).before)]
        original = corrupted.copy()
        ends = example["document_ends"]
        edges = [0, *ends[ends < len(tokens)].tolist(), len(tokens)]
        for first, last in itertools.pairwise(edges):
            text = tokens[first:last]
            inside = sentence_ends[(sentence_ends > first) & (sentence_ends < last)] - first
            corrupted += [self._corrupted(text, inside, vocab.mask_id, rng), [end]]
            original += [text, [end]]
        return encoder_decoder_row(
            np.concatenate(corrupted).astype(np.int32),
            np.concatenate(original).astype(np.int32),
            (sequence_length, sequence_length),
            self.first_id(vocab),
            vocab,
        )

    def first_id(self, vocab: Vocabulary) -> int:
        """First input of the decoder."""
        return end_id(vocab) if self.decoder_start_id is None else self.decoder_start_id

    def _corrupted(
        self, text: np.ndarray, sentence_ends: np.ndarray, mask_id: int, rng: Rng
    ) -> np.ndarray:
        """One document after all kinds of noise; never longer than before."""
        if self.permute_sentences:
            text = _permuted(text, sentence_ends, rng)
        if self.infill_share:
            text = _infilled(text, self.infill_share, self.mean_span, mask_id, rng)
        if self.mask_share:
            text = text.copy()
            text[_positions(len(text), self.mask_share, rng)] = mask_id
        if self.delete_share:
            text = np.delete(text, _positions(len(text), self.delete_share, rng))
        if self.rotate and len(text):
            text = np.roll(text, -int(rng.integers(len(text))))
        return text


def _positions(length: int, share: float, rng: Rng) -> np.ndarray:
    """A random share of all positions, in any order."""
    return rng.choice(length, round(length * share), replace=False, shuffle=False)


def _permuted(tokens: np.ndarray, ends: np.ndarray, rng: Rng) -> np.ndarray:
    """The sentences in random order; ``ends`` are the ends of all but the last."""
    edges = np.concatenate([[0], ends, [len(tokens)]])
    lengths = np.diff(edges)
    order = rng.permutation(len(lengths))
    moved = lengths[order]
    # Distance from the start of each sentence in the new text to its start in the old one.
    shift = edges[:-1][order] - (np.cumsum(moved) - moved)
    return tokens[np.arange(len(tokens)) + np.repeat(shift, moved)]


def poisson_span_lengths(total: int, mean: float, rng: Rng) -> np.ndarray:
    """Poisson lengths with the sum ``total``, of which the last is shortened: int64 [spans]."""
    drawn = np.zeros(0, np.int64)
    while (sum_drawn := int(drawn.sum())) < total:
        more = rng.poisson(mean, 8 + int((total - sum_drawn) / mean * 1.2))
        drawn = np.concatenate([drawn, more])
    sums = np.cumsum(drawn)
    last = int(np.searchsorted(sums, total))
    drawn = drawn[: last + 1]
    if total:
        drawn[last] -= sums[last] - total
    return drawn if total else drawn[:0]


def _infilled(tokens: np.ndarray, share: float, mean: float, mask_id: int, rng: Rng) -> np.ndarray:
    """Replace spans of ``share`` of the tokens by one mask each; never longer than the text.

    All orders of spans and kept tokens are equally likely. Spans do not overlap; adjacent spans
    become two masks.
    """
    total = round(len(tokens) * share)
    lengths = poisson_span_lengths(total, mean, rng)
    inserts = len(lengths) - np.count_nonzero(lengths)
    if len(lengths) > total:  # short texts: not more masks than replaced tokens
        lengths = np.concatenate(
            [lengths[lengths > 0], np.zeros(inserts - (len(lengths) - total), np.int64)]
        )
        lengths = rng.permutation(lengths)
    kept = len(tokens) - total
    masks = rng.choice(kept + len(lengths), len(lengths), replace=False, shuffle=False)
    masks.sort()
    widths = np.ones(kept + len(lengths), np.int64)
    widths[masks] = lengths
    starts = np.cumsum(widths) - widths
    # An empty span at the end starts after the last token.
    filled = tokens[np.minimum(starts, len(tokens) - 1)] if len(tokens) else tokens.copy()
    filled[masks] = mask_id
    return filled
