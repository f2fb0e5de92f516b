"""What objectives of encoder-decoders share: their rows, their terms and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
)
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.rows import pad
from flax_transformers.ranges import Ranges


@dataclass(frozen=True, kw_only=True)
class SequenceLoss(LMLoss):
    """Cross-entropy of ``labels`` that a decoder predicts one after the other."""

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("decoder_input_ids",))

    loss_name: ClassVar[str]
    """The term's name."""

    decoder_start_id: int | None = None
    """What the decoder reads first; None: padding, as in T5, or what the objective says of it."""

    RANGES: ClassVar[Ranges] = {"decoder_start_id": ranges.integers(0, 2**24)}

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """Cross-entropy and accuracy at the places of the decoder that have a weight."""
        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        labels_BT, weights_BT = batch["labels"], batch["weights"]
        return self.word_terms(self.loss_name, model, params, hidden_BTD, labels_BT, weights_BT)

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        """What the encoder reads; and what the decoder begins with and has to say."""
        segments, used = _parts(row, "")
        encoder = ExampleView("encoder", row["input_ids"][:used], segments=segments)
        segments, used = _parts(row, "decoder_")
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


def _parts(row: dict[str, np.ndarray], side: str) -> tuple[np.ndarray | None, int]:
    """The segments of one side of a row, if it has any, and how many of its places are used."""
    segments = row.get(f"{side}segment_ids")
    used = int(np.count_nonzero(row[f"{side}attention_mask"] if segments is None else segments))
    return None if segments is None else segments[:used], used


def encoder_decoder_row(
    inputs: np.ndarray,
    targets: np.ndarray,
    input_width: int,
    target_width: int,
    first_id: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """``inputs`` int [n] and ``targets`` int [m] with their ends, filled up to fixed widths.

    Gives ``input_ids``, ``attention_mask`` int32 [S]; ``decoder_input_ids`` (the targets, shifted
    by one behind ``first_id``), ``decoder_attention_mask``, ``labels`` int32 [T] and ``weights``
    float32 [T].
    """
    n, m = len(inputs), len(targets)
    decoder_input_ids = np.full(target_width, pad_id, np.int32)
    decoder_input_ids[0] = first_id
    decoder_input_ids[1:m] = targets[:-1]
    filled = np.arange(target_width) < m
    return {
        "input_ids": pad(inputs, input_width, pad_id),
        "attention_mask": (np.arange(input_width) < n).astype(np.int32),
        "decoder_input_ids": decoder_input_ids,
        "decoder_attention_mask": filled.astype(np.int32),
        "labels": pad(targets, target_width, pad_id),
        "weights": filled.astype(np.float32),
    }
