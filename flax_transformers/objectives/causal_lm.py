"""Causal language modelling of packed documents (GPT, GPT-2, LLaMA ...)."""

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
    Rng,
    Rngs,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.rows import document_start, end_id, pad


@dataclass(frozen=True, kw_only=True)
class DecoderLoss(LMLoss):
    """Loss of a decoder over documents packed into sequences."""

    loss_name: ClassVar[str]
    """Name of the loss term."""

    cross_documents: bool = True
    """Fill sequences across document ends; else one document each."""
    balance_weight: float = 0.02
    """Coefficient of the load-balancing loss of a mixture of experts (0.02 in the config.json of
    Mixtral 8x7B); no effect on other models."""

    RANGES: ClassVar[ranges.Ranges] = {"balance_weight": ranges.COEFFICIENT}

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # The end of a document at the end of the window takes a position too.
        return WindowSpec(
            sequence_length - 1, self.cross_documents, whole_sentences=False, sentence_ends=False
        )

    def predictions(self, sequence_length: int) -> int:
        """Logits are computed for every position."""
        return sequence_length

    def frame(self, vocab: Vocabulary) -> Frame:
        """Special tokens around a document."""
        return Frame(before=(document_start(vocab),))

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss, "z_loss" if enabled, "balance" for a mixture of experts; loss and accuracy."""
        states = model.hidden_states(params, batch, rngs)
        labels_BT, weights_BT = batch["labels"], batch["label_weights"]
        terms = self.lm_terms(
            self.loss_name, model, params, states.last_hidden_state, labels_BT, weights_BT
        )
        if states.auxiliary is None:
            return terms
        balance, tokens = states.auxiliary.by_sequence()
        return terms | LossTerms(
            losses={"balance": (balance, tokens, self.balance_weight)},
            metrics={"balance": (balance, tokens)},
        )


@dataclass(frozen=True, kw_only=True)
class CausalLM(DecoderLoss):
    """Predict each token from the previous ones of its document.

    Every token of a window is predicted once, and so is the end of each document. The first token
    of a sequence, and of a document in it, is predicted from the token that begins documents.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("segment_ids",), causal=True)
    loss_name: ClassVar[str] = "causal_lm"

    attend_across: bool = False
    """Let the documents of a sequence attend to the previous ones, as in GPT-2."""

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``input_ids``, ``segment_ids`` and ``labels`` int32 [T]; ``label_weights`` float32 [T].

        Segment ids are the numbers of the documents from 1 (all 1 with ``attend_across``), and 0 at
        padding.
        """
        inputs, labels, document = packed_documents(example, vocab)
        if self.attend_across:
            document = np.ones_like(document)
        weights = np.ones(len(labels), np.float32)
        return causal_row(inputs, labels, document, weights, vocab, sequence_length)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """The documents, each as its first input and its labels."""
        segments = row["segment_ids"]
        used = int((segments > 0).sum())
        segments, labels = segments[:used], row["labels"][:used]
        first = np.flatnonzero(np.diff(segments, prepend=0))
        predicted = np.where(row["label_weights"][:used] > 0, labels, -1)
        return [
            ExampleView(
                "row",
                ids=np.insert(labels, first, row["input_ids"][first]),
                labels=np.insert(predicted, first, -1),
                segments=np.insert(segments, first, segments[first]),
            )
        ]


def packed_documents(
    example: Arrays, vocab: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and document numbers from 1, int32 [n] each.

    The labels are the tokens, and after each document the id that ends it. An input is the previous
    label, or where a document or the window begins, the id that begins documents.
    """
    end = end_id(vocab)
    tokens, ends = example["tokens"], example["document_ends"]
    labels = np.insert(tokens, ends, end).astype(np.int32)
    after = ends + np.arange(1, len(ends) + 1)  # first label of the next document
    first = np.append(0, after[after < len(labels)])[: len(labels)]
    inputs = np.append(np.int32(0), labels[:-1])[: len(labels)]
    inputs[first] = document_start(vocab)
    begins = np.zeros(len(labels), np.int32)
    begins[first] = 1
    return inputs, labels, np.cumsum(begins, dtype=np.int32)


def causal_row(
    inputs: np.ndarray,
    labels: np.ndarray,
    segments: np.ndarray,
    weights: np.ndarray,
    vocab: Vocabulary,
    length: int,
) -> Arrays:
    """The arrays that `DecoderLoss.terms` reads, padded to ``length``."""
    return {
        "input_ids": pad(inputs, length, vocab.pad_id),
        "segment_ids": pad(segments, length, 0),
        "labels": pad(labels, length, vocab.pad_id),
        "label_weights": pad(weights, length, 0),
    }
