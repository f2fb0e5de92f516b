"""Sequence to sequence: translation, summarisation, any pair of a source and a target text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id, pad, start_id
from flax_transformers.objectives.sequences import SequenceLoss
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class PairSpec(WindowSpec):
    """What a row of pairs holds: sources of ``length`` tokens in all, targets of ``target_length``.

    Each pair needs ``overhead`` places more on either side. ``cross_documents``: several pairs go
    into a row, else one. ``long_pairs``: what is too long for a row is cut, or left out.
    """

    target_length: int = 0
    overhead: int = 1
    long_pairs: Literal["cut", "skip"] = "cut"


@dataclass(frozen=True)
class SequenceToSequence(SequenceLoss):
    """Predict the target from the source, several pairs in a row that do not see one another.

    The data are pairs (`PairSource`); ``sequence_length`` is the length of the encoder's rows.
    """

    loss_name: ClassVar[str] = "sequence_to_sequence"

    label_smoothing: float = 0.1  # arXiv:1706.03762 §5.4
    target_length: int | None = None
    """Length of the decoder's rows; None: that of the encoder's."""
    pack: bool = True
    """Put as many pairs into a row as fit."""
    begin: bool = False
    """Begin both sides with their tokenizer's token for it, as BART does."""
    start: Literal["pad", "end"] = "pad"
    """What the decoder reads first, if ``decoder_start_id`` does not say it: padding, as in T5 and
    Marian, or the end of a sequence, as in BART."""
    long_pairs: Literal["cut", "skip"] = "cut"
    """Cut what is too long for a row, or leave such pairs out."""

    RANGES: ClassVar[Ranges] = {"target_length": ranges.POSITIONS}

    def window_spec(self, sequence_length: int) -> PairSpec:
        return PairSpec(
            sequence_length,
            cross_documents=self.pack,
            target_length=self.predictions(sequence_length),
            overhead=1 + self.begin,
            long_pairs=self.long_pairs,
        )

    def predictions(self, sequence_length: int) -> int:
        """Length of the decoder's rows."""
        return sequence_length if self.target_length is None else self.target_length

    def frame(self, vocab: Vocabulary) -> Frame:
        """What a source begins and ends with, and a target in its own vocabulary."""
        begin = self._begin(vocab)
        return Frame(() if begin is None else (begin,), (end_id(vocab),))

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row of the pairs in ``source_tokens``, ``target_tokens`` int32, which end at
        ``source_ends`` and ``target_ends``; nothing in it is random.

        ``input_ids`` and ``segment_ids`` int32 [S]; ``decoder_input_ids``, ``decoder_segment_ids``,
        ``labels`` int32 [T] and ``weights`` float32 [T]. Segments count the pairs from 1; 0 is
        padding. Each side has the special ids of its own vocabulary.
        """
        if "source_ends" not in example:
            raise UserError(
                "sequence-to-sequence training needs pairs of texts; set data.source to a "
                "PairSource"
            )
        width = self.predictions(sequence_length)
        inputs, segments = _joined(
            example["source_tokens"], example["source_ends"], self._begin(vocab), end_id(vocab)
        )
        target = vocab.of_targets
        labels, decoder_segments = _joined(
            example["target_tokens"], example["target_ends"], self._begin(target), end_id(target)
        )
        decoder_inputs = np.empty_like(labels)
        decoder_inputs[1:] = labels[:-1]
        decoder_inputs[np.diff(decoder_segments, prepend=0) > 0] = self.first_id(target)
        return {
            "input_ids": pad(inputs, sequence_length, vocab.pad_id),
            "segment_ids": pad(segments, sequence_length, 0),
            "decoder_input_ids": pad(decoder_inputs, width, target.pad_id),
            "decoder_segment_ids": pad(decoder_segments, width, 0),
            "labels": pad(labels, width, target.pad_id),
            "weights": pad(np.ones(len(labels), np.float32), width, 0),
        }

    def first_id(self, target: Vocabulary) -> int:
        """What the decoder reads first."""
        if self.decoder_start_id is not None:
            return self.decoder_start_id
        return target.pad_id if self.start == "pad" else end_id(target)

    def _begin(self, vocab: Vocabulary) -> int | None:
        begin = start_id(vocab) if self.begin else None
        if self.begin and begin is None:
            raise UserError(
                "the tokenizer has no token that begins a sequence; set objective.begin to False, "
                "or choose another tokenizer"
            )
        return begin


def _joined(
    tokens: np.ndarray, ends: np.ndarray, begin: int | None, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts one after the other, each with its beginning and end, and the number of each token's.

    Both int32.
    """
    lengths = np.diff(ends, prepend=0)
    extra = 1 if begin is None else 2
    segments = np.repeat(np.arange(1, len(ends) + 1, dtype=np.int32), lengths + extra)
    last = ends + extra * np.arange(1, len(ends) + 1) - 1
    joined = np.empty(len(segments), np.int32)
    ordinary = np.ones(len(segments), bool)
    ordinary[last] = False
    if begin is not None:
        first = last - lengths - 1
        ordinary[first] = False
        joined[first] = begin
    joined[ordinary] = tokens
    joined[last] = end
    return joined, segments
