"""Prefix language modelling: the beginning of a text is read both ways, the rest predicted."""

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
    Frame,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.causal_lm import (
    causal_row,
    causal_terms,
    documents_in_turn,
)
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.rows import document_start, pad
from flax_transformers.ranges import Ranges


@dataclass(frozen=True, kw_only=True)
class PrefixLM(LMLoss):
    """Predict the rest of each document from its beginning (T5, arXiv:1910.10683 §3.2.1; the
    S-denoiser of UL2, arXiv:2205.05131).

    Each document of a row is divided at a random place: all of its tokens see those before, every
    one of these sees the others, and only what comes behind is predicted. It needs a model that
    looks back (a decoder), and its prefix has at least one token where the text has two.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("prefix_mask",), causal=True)

    cross_documents: bool = False
    """Several documents in a row, each with a division of its own, or one document a row."""
    balance_weight: float = 0.02
    """As in `CausalLM`."""

    RANGES: ClassVar[Ranges] = {"balance_weight": ranges.COEFFICIENT}

    def window_spec(self, sequence_length: int) -> WindowSpec:
        return WindowSpec(sequence_length - 1, self.cross_documents, whole_sentences=False)

    def predictions(self, sequence_length: int) -> int:
        """Every place gets logits."""
        return sequence_length

    def frame(self, vocab: Vocabulary) -> Frame:
        """What a document begins with."""
        return Frame(before=(document_start(vocab),))

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """The arrays of `CausalLM`, and ``prefix_mask`` int32 [T]: 1 at what all may see.

        A prefix of k tokens are the first k + 1 inputs, as the first of all stands for the
        beginning; the last of these predicts the first token behind the prefix.
        """
        inputs, labels, document = documents_in_turn(example, vocab)
        place, length = _places(document)
        # At least one token before the division, and at least one to predict behind it.
        divided = 1 + np.floor(rng.random(len(length)) * (length - 1)).astype(np.int64)
        division = np.minimum(divided, length - 1)[document - 1]
        row = causal_row(
            inputs, labels, document, (place >= division).astype(np.float32), vocab, sequence_length
        )
        prefix = (place <= division).astype(np.int32)
        return row | {"prefix_mask": pad(prefix, sequence_length, 0)}

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "prefix_lm", perhaps "z_loss" and "balance"; cross-entropy and accuracy."""
        return causal_terms(self, "prefix_lm", self.balance_weight, model, params, batch, rngs)

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        segments = row["segment_ids"]
        shown = []
        for number in range(1, int(segments.max(initial=0)) + 1):
            labels = row["labels"][segments == number]
            rest = row["label_weights"][segments == number] > 0
            begin = row["input_ids"][segments == number][:1]
            shown.append(ExampleView("prefix", np.append(begin, labels[~rest])))
            shown.append(ExampleView("rest", labels[rest], labels[rest]))
        return shown


def _places(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each token in its document, and the lengths of the documents, int64."""
    length = np.bincount(document)[1:]
    return np.arange(len(document)) - np.repeat(np.cumsum(length) - length, length), length
