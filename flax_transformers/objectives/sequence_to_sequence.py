"""Sequence to sequence: translation, summarisation, any pairs of source and target texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, Frame, Rng, Vocabulary, WindowSpec
from flax_transformers.objectives.rows import end_id, pad, start_id
from flax_transformers.objectives.sequences import SequenceLoss


@dataclass(frozen=True)
class PairSpec(WindowSpec):
    """How pairs are packed: sources of ``length`` tokens in all, targets of ``target_length``.

    With ``cross_documents``, several pairs are packed into a sequence, else one.

    Attributes:
      target_length: maximum number of tokens of the targets; None: no limit.
      overhead: number of special tokens of each source and each target.
      long_pairs: whether pairs that are too long are truncated or left out.
    """

    target_length: int | None = 0
    overhead: int = 1
    long_pairs: Literal["cut", "skip"] = "cut"

    @property
    def target_kind(self) -> str:
        return "pairs"

    @property
    def source_kind(self) -> str:
        return "PairSource"

    def dummy_example(self, tokens: np.ndarray, texts: int) -> Arrays:
        token, end = tokens[:1], np.ones(1, np.int32)
        return {
            "source_tokens": token, "source_ends": end, "target_tokens": token, "target_ends": end
        }  # fmt: skip


@dataclass(frozen=True)
class SequenceToSequence(SequenceLoss):
    """Predict the target from the source; packed pairs do not attend to each other.

    The data are pairs (`PairSource`). ``sequence_length`` is the length of the encoder's inputs.
    """

    loss_name: ClassVar[str] = "sequence_to_sequence"

    label_smoothing: float = 0.1  # arXiv:1706.03762 section 5.4
    target_length: int | None = None
    """Length of the decoder's inputs. None: that of the encoder's."""
    pack: bool = True
    """Pack as many pairs into a sequence as fit."""
    begin: bool = False
    """Begin sources and targets with BOS, as BART does."""
    start: Literal["pad", "end"] = "pad"
    """First input of the decoder if ``decoder_start_id`` is None: padding, as in T5 and Marian, or
    EOS, as in BART."""
    long_pairs: Literal["cut", "skip"] = "cut"
    """Truncate pairs that are too long, or leave them out."""

    RANGES: ClassVar[ranges.Ranges] = {"target_length": ranges.POSITIONS}

    def window_spec(self, sequence_length: int) -> PairSpec:
        return PairSpec(
            sequence_length,
            cross_documents=self.pack,
            target_length=self.predictions(sequence_length),
            overhead=1 + self.begin,
            long_pairs=self.long_pairs,
        )

    def predictions(self, sequence_length: int) -> int:
        """Length of the decoder's inputs."""
        return sequence_length if self.target_length is None else self.target_length

    def frame(self, vocab: Vocabulary) -> Frame:
        """Special tokens around a source, and around a target in its own vocabulary."""
        begin = self._begin(vocab)
        return Frame(() if begin is None else (begin,), (end_id(vocab),))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare the pairs in ``source_tokens`` and ``target_tokens`` int32, which end at
        ``source_ends`` and ``target_ends``; not random.

        ``input_ids`` and ``segment_ids`` int32 [S]; ``decoder_input_ids``, ``decoder_segment_ids``,
        ``labels`` int32 [T] and ``weights`` float32 [T]. Segment ids are the numbers of the pairs
        from 1, and 0 at padding. Special ids are those of the vocabulary of each side.
        """
        if "source_ends" not in example:
            raise UserError(
                "sequence-to-sequence training needs pairs of texts; set data.source to a "
                "PairSource"
            )
        target_length = self.predictions(sequence_length)
        inputs, segments = _joined(
            example["source_tokens"], example["source_ends"], self._begin(vocab), end_id(vocab)
        )
        target = vocab.of_targets
        labels, decoder_segments = _joined(
            example["target_tokens"], example["target_ends"], self._begin(target), end_id(target)
        )
        decoder_inputs = np.roll(labels, 1)
        decoder_inputs[np.diff(decoder_segments, prepend=0) > 0] = self.first_id(target)
        return {
            "input_ids": pad(inputs, sequence_length, vocab.pad_id),
            "segment_ids": pad(segments, sequence_length, 0),
            "decoder_input_ids": pad(decoder_inputs, target_length, target.pad_id),
            "decoder_segment_ids": pad(decoder_segments, target_length, 0),
            "labels": pad(labels, target_length, target.pad_id),
            "weights": pad(np.ones(len(labels), np.float32), target_length, 0),
        }

    def first_id(self, vocab: Vocabulary) -> int:
        """First input of the decoder."""
        if self.decoder_start_id is not None or self.start == "pad":
            return super().first_id(vocab)
        return end_id(vocab)

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
    """Concatenated texts with their special tokens, and the number of the text of each token.

    Both are int32.
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
