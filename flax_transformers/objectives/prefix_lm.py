"""Prefix language modelling: bidirectional attention to a prefix, prediction of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers.objectives.base import Arrays, ExampleView, ModelNeeds, Rng, Vocabulary
from flax_transformers.objectives.causal_lm import DecoderLoss, causal_row, packed_documents
from flax_transformers.objectives.rows import pad


@dataclass(frozen=True, kw_only=True)
class PrefixLM(DecoderLoss):
    """Predict the rest of each document from its beginning (T5, arXiv:1910.10683 section 3.2.1; the
    S-denoiser of UL2, arXiv:2205.05131).

    Each document of a sequence is split at a random position. Its tokens attend to the previous
    ones and to the whole prefix, and only the tokens after the prefix are predicted. The model must
    be a decoder. The prefix has at least one token if the text has two.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("prefix_mask",), causal=True)
    loss_name: ClassVar[str] = "prefix_lm"

    cross_documents: bool = False
    """Several documents in a sequence, each with its own prefix; else one document each."""

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The arrays of `CausalLM`, and ``prefix_mask`` int32 [T], 1 at the prefix.

        A prefix of k tokens is the first k + 1 inputs, of which the first is the token that begins
        documents and the last predicts the first token after the prefix.
        """
        inputs, labels, document = packed_documents(example, vocab)
        position, length = _positions(document)
        # At least one token is in the prefix, and at least one is predicted.
        drawn = 1 + np.floor(rng.random(len(length)) * (length - 1)).astype(np.int64)
        split = np.minimum(drawn, length - 1)[document - 1]
        weights = (position >= split).astype(np.float32)
        row = causal_row(inputs, labels, document, weights, vocab, sequence_length)
        prefix = (position <= split).astype(np.int32)
        return row | {"prefix_mask": pad(prefix, sequence_length, 0)}

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """The prefix and the rest of each document."""
        segments = row["segment_ids"]
        views = []
        for number in range(1, int(segments.max(initial=0)) + 1):
            labels = row["labels"][segments == number]
            rest = row["label_weights"][segments == number] > 0
            begin = row["input_ids"][segments == number][:1]
            views.append(ExampleView("prefix", np.append(begin, labels[~rest])))
            views.append(ExampleView("rest", labels[rest], labels[rest]))
        return views


def _positions(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The position of each token in its document, and the lengths of the documents, int64."""
    length = np.bincount(document)[1:]
    return np.arange(len(document)) - np.repeat(np.cumsum(length) - length, length), length
