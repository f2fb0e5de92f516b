"""Denoising: BART (arXiv:1910.13461 §2.2), to write a text from a damaged copy of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id, start_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class Denoising(SequenceLoss):
    """Restore a whole text after sentence permutation, infilling, masking, deletion and rotation.

    They come in this order; the defaults are those of the paper's large model (§4: infilling and
    permutation). Shares count tokens of a document, exactly. A row is one document or a part of
    it, between the tokens that begin and end a sequence, which no noise touches. The decoder begins
    with the end of a sequence.
    """

    loss_name: ClassVar[str] = "denoising"

    infill_share: float = 0.3
    """Tokens in spans that become one [MASK] each; a span without a token inserts a [MASK]."""
    mean_span: float = 3.0
    """Mean of the Poisson distribution of the spans' lengths."""
    permute_sentences: bool = True
    """Bring the sentences into a random order."""
    mask_share: float = 0.0
    """Tokens that become [MASK] each on its own."""
    delete_share: float = 0.0
    """Tokens that are left out."""
    rotate: bool = False
    """Let the text begin at a random token and go on from its end to its beginning."""
    cross_documents: bool = False
    """Fill rows with several documents, damaged each on its own, with the end of a sequence after
    each. BART keeps to one document a row, which leaves rows of short documents mostly empty."""

    RANGES: ClassVar[Ranges] = {
        "infill_share": ranges.RATE,
        "mean_span": ranges.numbers(0, 100, above=True),
        "mask_share": ranges.RATE,
        "delete_share": ranges.RATE,
    }

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # One place for the token that begins a sequence, one for that which ends it.
        return WindowSpec(sequence_length - 2, self.cross_documents)

    def predictions(self, sequence_length: int) -> int:
        """Width of the targets: the whole row."""
        return sequence_length

    def frame(self, vocab: Vocabulary) -> Frame:
        """What a source begins and ends with."""
        begin = start_id(vocab)
        return Frame(() if begin is None else (begin,), (end_id(vocab),))

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row; see `encoder_decoder_row`."""
        if vocab.mask_id is None:
            raise UserError("the tokenizer has no [MASK], which denoising needs; choose another")
        begin, end = start_id(vocab), end_id(vocab)
        tokens, sentence_ends = example["tokens"], example["sentence_ends"]
        damaged: list[np.ndarray | list[int]] = [[] if begin is None else [begin]]
        whole = damaged.copy()
        ends = example["document_ends"]
        edges = [0, *ends[ends < len(tokens)].tolist(), len(tokens)]
        for first, last in itertools.pairwise(edges):
            text = tokens[first:last]
            inside = sentence_ends[(sentence_ends > first) & (sentence_ends < last)] - first
            damaged += [self._damaged(text, inside, vocab.mask_id, rng), [end]]
            whole += [text, [end]]
        return encoder_decoder_row(
            np.concatenate(damaged).astype(np.int32),
            np.concatenate(whole).astype(np.int32),
            sequence_length,
            sequence_length,
            end if self.decoder_start_id is None else self.decoder_start_id,
            vocab.pad_id,
        )

    def _damaged(
        self, text: np.ndarray, sentence_ends: np.ndarray, mask_id: int, rng: np.random.Generator
    ) -> np.ndarray:
        """One document with all kinds of noise; never longer than it was."""
        if self.permute_sentences:
            text = _permuted(text, sentence_ends, rng)
        if self.infill_share:
            text = _infilled(text, self.infill_share, self.mean_span, mask_id, rng)
        if self.mask_share:
            text = text.copy()
            text[_some(len(text), self.mask_share, rng)] = mask_id
        if self.delete_share:
            text = np.delete(text, _some(len(text), self.delete_share, rng))
        if self.rotate and len(text):
            text = np.roll(text, -int(rng.integers(len(text))))
        return text


def _count(tokens: int, share: float) -> int:
    return round(tokens * share)


def _some(length: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """That share of all positions, in any order."""
    return rng.choice(length, _count(length, share), replace=False, shuffle=False)


def _permuted(tokens: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sentences in a random order; ``ends`` are where all but the last end."""
    edges = np.concatenate([[0], ends, [len(tokens)]])
    lengths = np.diff(edges)
    order = rng.permutation(len(lengths))
    moved = lengths[order]
    # Place p of the new text is place p of its sentence's beginning there, moved to where it was.
    shift = edges[:-1][order] - (np.cumsum(moved) - moved)
    return tokens[np.arange(len(tokens)) + np.repeat(shift, moved)]


def span_lengths(total: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson lengths that add up to ``total``: the last one is cut to fit. int64 [spans]."""
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


def _infilled(
    tokens: np.ndarray, share: float, mean: float, mask_id: int, rng: np.random.Generator
) -> np.ndarray:
    """Spans of ``share`` of the tokens replaced by one mask each; never longer than the text.

    Spans and kept tokens stand in any order equally likely. Spans do not overlap; where two meet
    there are two masks.
    """
    total = _count(len(tokens), share)
    lengths = span_lengths(total, mean, rng)
    inserts = len(lengths) - np.count_nonzero(lengths)
    if len(lengths) > total:  # short texts: no more masks than tokens that they replace
        lengths = np.concatenate(
            [lengths[lengths > 0], np.zeros(inserts - (len(lengths) - total), np.int64)]
        )
        lengths = rng.permutation(lengths)
    kept = len(tokens) - total
    places = rng.choice(kept + len(lengths), len(lengths), replace=False, shuffle=False)
    places.sort()
    widths = np.ones(kept + len(lengths), np.int64)
    widths[places] = lengths
    starts = np.cumsum(widths) - widths
    # A span without a token at the very end starts behind the last token.
    filled = tokens[np.minimum(starts, len(tokens) - 1)] if len(tokens) else tokens.copy()
    filled[places] = mask_id
    return filled
