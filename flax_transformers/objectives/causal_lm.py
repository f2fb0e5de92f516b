"""Language modelling from left to right, documents packed into rows (GPT, GPT-2, LLaMA ...)."""

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
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.rows import document_start, end_id, pad
from flax_transformers.ranges import Ranges


@dataclass(frozen=True, kw_only=True)
class CausalLM(LMLoss):
    """Predict each token from those before it in its document.

    Every token of a window is predicted once, and so is the end of each document. What a row, or a
    document in it, begins with is predicted from a token that stands for the beginning.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("segment_ids",), causal=True)

    cross_documents: bool = True
    """Fill rows across document ends or keep to one document a row."""
    attend_across: bool = False
    """Let the documents of a row see those before them, as GPT-2 did."""
    balance_weight: float = 0.02
    """Coefficient of the load-balancing loss of a mixture of experts (0.02 in Mixtral 8x7B's
    config.json); without effect on models that have none."""

    RANGES: ClassVar[Ranges] = {"balance_weight": ranges.COEFFICIENT}

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # A document end at the end of the window takes a place too.
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
        """``input_ids``, ``segment_ids``, ``labels`` int32 [T]; ``label_weights`` float32 [T].

        Segments number the documents from 1, 0 at padding; with ``attend_across`` all are 1.
        """
        inputs, labels, document = documents_in_turn(example, vocab)
        if self.attend_across:
            document = np.ones_like(document)
        weights = np.ones(len(labels), np.float32)
        return causal_row(inputs, labels, document, weights, vocab, sequence_length)

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "causal_lm", perhaps "z_loss" and "balance"; cross-entropy and accuracy."""
        return causal_terms(self, "causal_lm", self.balance_weight, model, params, batch, rngs)

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        return [shown_documents(row)]


def documents_in_turn(
    example: dict[str, np.ndarray], vocab: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and document numbers from 1, int32 [n] each.

    The labels are the tokens, with the end of each document behind it. An input is the label
    before it, or the beginning of text where a document, or the window, begins.
    """
    end = end_id(vocab)
    tokens, ends = example["tokens"], example["document_ends"]
    labels = np.insert(tokens, ends, end).astype(np.int32)
    after = ends + np.arange(1, len(ends) + 1)  # where the next document begins among the labels
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
) -> dict[str, np.ndarray]:
    """The arrays that ``causal_terms`` reads, filled up to ``length``."""
    return {
        "input_ids": pad(inputs, length, vocab.pad_id),
        "segment_ids": pad(segments, length, 0),
        "labels": pad(labels, length, vocab.pad_id),
        "label_weights": pad(weights, length, 0),
    }


def causal_terms(
    loss: LMLoss,
    name: str,
    balance_weight: float,
    model: ModelFunctions,
    params: Params,
    batch: Batch,
    rngs: Mapping[str, Array],
) -> LossTerms:
    """The loss of a row of ``causal_row``, with the balance of experts where the model has some."""
    states = model.hidden_states(params, batch, rngs)
    terms = loss.word_terms(
        name, model, params, states.last_hidden_state, batch["labels"], batch["label_weights"]
    )
    if states.auxiliary is not None:
        balance, tokens = states.auxiliary.by_sequence()
        terms.losses["balance"] = (balance, tokens, balance_weight)
        terms.metrics["balance"] = (balance, tokens)
    return terms


def shown_documents(row: dict[str, np.ndarray]) -> ExampleView:
    """A row of ``causal_row``: each document's first input, then its labels."""
    segments = row["segment_ids"]
    used = int((segments > 0).sum())
    segments, labels = segments[:used], row["labels"][:used]
    first = np.flatnonzero(np.diff(segments, prepend=0))
    predicted = np.where(row["label_weights"][:used] > 0, labels, -1)
    return ExampleView(
        "row",
        ids=np.insert(labels, first, row["input_ids"][first]),
        labels=np.insert(predicted, first, -1),
        segments=np.insert(segments, first, segments[first]),
    )
