"""Supervised fine-tuning: answers in conversations are predicted, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Arrays,
    ExampleView,
    Frame,
    ModelNeeds,
    Rng,
    Vocabulary,
)
from flax_transformers.objectives.causal_lm import DecoderLoss, causal_row
from flax_transformers.objectives.rows import end_id
from flax_transformers.objectives.sequences import SequenceLoss, encoder_decoder_row
from flax_transformers.post_training.chat_data import ConversationSpec


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(DecoderLoss):
    """Predict the assistant turns of conversations (InstructGPT, arXiv:2203.02155 section 3.5).

    The data are conversations (`ChatData`); of preferences the best completion is learned.
    ``cross_documents``: pack as many conversations into a row as fit; they do not attend to each
    other, and positions restart in each. The loss is the mean over all learned tokens of a batch.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("segment_ids",), causal=True)
    loss_name: ClassVar[str] = "supervised"

    def window_spec(self, sequence_length: int) -> ConversationSpec:
        return ConversationSpec(sequence_length, self.cross_documents)

    def frame(self, vocab: Vocabulary) -> Frame:
        """None: the chat template writes all special tokens."""
        return Frame()

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``input_ids``, ``segment_ids`` and ``labels`` int32 [T]; ``label_weights`` float32 [T], 1
        where the next token is learned; not random. Segments are numbered from 1, 0 at padding."""
        return conversation_row(example, vocab, sequence_length)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """The conversations; what is learned is marked as predicted."""
        return [conversation_view(row)]


@dataclass(frozen=True, kw_only=True)
class SupervisedEncoderDecoder(SequenceLoss):
    """Predict the last assistant turn of a conversation from all before it, with an
    encoder-decoder.

    ``sequence_length`` is the length of the encoder's inputs, of which a turn that comes later is
    not learned.
    """

    loss_name: ClassVar[str] = "supervised"

    target_length: int | None = None
    """Length of the decoder's inputs. None: that of the encoder's."""

    RANGES: ClassVar[ranges.Ranges] = {"target_length": ranges.POSITIONS}

    def window_spec(self, sequence_length: int) -> ConversationSpec:
        # Both sides end with a token that ends texts.
        target = self.predictions(sequence_length) - 1
        if min(sequence_length - 1, target) < 1:
            raise UserError("the sequences are too short for a conversation; use longer ones")
        return ConversationSpec(sequence_length - 1, False, target_length=target)

    def predictions(self, sequence_length: int) -> int:
        """Length of the decoder's inputs."""
        return sequence_length if self.target_length is None else self.target_length

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The arrays of `encoder_decoder_row`; not random."""
        tokens, end = example["tokens"], end_id(vocab)
        start = int(np.argmax(example["learned"]))
        source, answer = (
            part if part[-1:].tolist() == [end] else np.append(part, end)
            for part in (tokens[:start], tokens[start:])
        )
        lengths = sequence_length, self.predictions(sequence_length)
        return encoder_decoder_row(source, answer, lengths, self.first_id(vocab), vocab)


def conversation_row(example: Arrays, vocab: Vocabulary, sequence_length: int) -> Arrays:
    """The sequences of an example, each a segment, as `causal_row`.

    The label of a token is the next one of its sequence; the last has weight 0.
    """
    tokens, ends, learned = example["tokens"], example["ends"], example["learned"]
    lengths = np.diff(ends, prepend=0)
    segments = np.repeat(np.arange(1, len(ends) + 1, dtype=np.int32), lengths)
    follows = np.ones(len(tokens), bool)  # whether the next token is of the same sequence
    follows[ends - 1] = False
    weights = (np.roll(learned, -1) & follows).astype(np.float32)
    return causal_row(tokens, np.roll(tokens, -1), segments, weights, vocab, sequence_length)


def conversation_view(row: Arrays, note: str = "") -> ExampleView:
    """The sequences of a row of `conversation_row`."""
    used = int((row["segment_ids"] > 0).sum())
    ids, weights = row["input_ids"][:used], row["label_weights"][:used]
    learned = np.roll(weights, 1) > 0  # the last token of a sequence predicts nothing
    labels = np.where(learned, ids, -1)
    return ExampleView("row", ids, labels=labels, segments=row["segment_ids"][:used], note=note)
