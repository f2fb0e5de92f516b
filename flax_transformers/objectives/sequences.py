"""Base of the objectives of encoder-decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Arrays,
    Batch,
    ExampleView,
    Frame,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.rows import end_id, pad, padded_tokens


@dataclass(frozen=True, kw_only=True)
class SequenceLoss(LMLoss):
    """Cross-entropy of the labels of a decoder."""

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("decoder_input_ids",))

    loss_name: ClassVar[str]
    """Name of the loss term."""

    decoder_start_id: int | None = None
    """First input of the decoder. None: padding, as in T5, or as the objective defines it."""

    RANGES: ClassVar[ranges.Ranges] = {"decoder_start_id": ranges.integers(0, 2**24)}

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss, and "z_loss" if enabled; the metrics "loss" and "accuracy"."""
        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        labels_BT, weights_BT = batch["labels"], batch["weights"]
        return self.lm_terms(self.loss_name, model, params, hidden_BTD, labels_BT, weights_BT)

    def frame(self, vocab: Vocabulary) -> Frame:
        """Special tokens around an input of the encoder."""
        return Frame(after=(end_id(vocab),))

    def first_id(self, vocab: Vocabulary) -> int:
        """First input of the decoder."""
        return vocab.pad_id if self.decoder_start_id is None else self.decoder_start_id

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """The inputs of the encoder; the first input and the labels of the decoder."""
        segments, used = _segments(row, "")
        encoder = ExampleView("encoder", row["input_ids"][:used], segments=segments)
        segments, used = _segments(row, "decoder_")
        labels = row["labels"][:used]
        first = np.arange(min(used, 1))
        if segments is not None:
            first = np.flatnonzero(np.diff(segments, prepend=0))
            segments = np.insert(segments, first, segments[first])
        predicted = np.where(row["weights"][:used] > 0, labels, -1)
        decoder = ExampleView(
            "decoder",
            ids=np.insert(labels, first, row["decoder_input_ids"][first]),
            labels=np.insert(predicted, first, -1),
            segments=segments,
            written=True,
        )
        return [encoder, decoder]


def _segments(row: Arrays, prefix: str) -> tuple[np.ndarray | None, int]:
    """Segments of the encoder or decoder, if there are any, and its number of tokens."""
    segments = row.get(f"{prefix}segment_ids")
    used = int(np.count_nonzero(row[f"{prefix}attention_mask"] if segments is None else segments))
    return None if segments is None else segments[:used], used


def encoder_decoder_row(
    inputs: np.ndarray,
    targets: np.ndarray,
    lengths: tuple[int, int],
    first_id: int,
    vocab: Vocabulary,
) -> Arrays:
    """``inputs`` int [n] and ``targets`` int [m] with their ends, padded to ``lengths`` (S, T).

    Returns ``input_ids``, ``attention_mask`` int32 [S]; ``decoder_input_ids`` (the targets shifted
    by one, after ``first_id``), ``decoder_attention_mask``, ``labels`` int32 [T] and ``weights``
    float32 [T].
    """
    length, target_length = lengths
    decoder = padded_tokens(np.append(first_id, targets[:-1]), target_length, vocab)
    return padded_tokens(inputs, length, vocab) | {
        "decoder_input_ids": decoder["input_ids"],
        "decoder_attention_mask": decoder["attention_mask"],
        "labels": pad(targets, target_length, vocab.pad_id),
        "weights": decoder["attention_mask"].astype(np.float32),
    }
