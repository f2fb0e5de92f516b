"""Masked language modelling and next-sentence prediction (BERT, arXiv:1810.04805)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Arrays,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.masked_lm import Masking, masked_view
from flax_transformers.objectives.rows import framing_ids, pad

_FRAMING = 3  # [CLS] A [SEP] B [SEP]


@dataclass(frozen=True)
class NextSentence(Masking):
    """Predict masked tokens of ``[CLS] A [SEP] B [SEP]``, and whether B follows A in the text.

    A window of one document is split at a random sentence end. With probability one half, B is
    the rest of the window. Else it is taken from a random window of another document: whole
    sentences from a random one on, as many as fit, or about as long as the true B if that ends its
    document.

    Only the text distinguishes the two kinds of pairs. Therefore, no pair is truncated (BERT's own
    code removes tokens from the longer of A and B). If only one kind is possible, because the
    window has one sentence or no sentence of the other window fits, the example is
    ``[CLS] A [SEP]`` with masks, and has no weight in next-sentence prediction (BERT's code gives
    single sentences a random B, so that fewer than half of its pairs are true). The part of a
    window that another B replaces is used in other epochs (BERT's code uses it next). No example is
    shortened at random (BERT's code shortens one in ten).

    RoBERTa (arXiv:1907.11692 section 4.2) calls this "segment-pair", and "sentence-pair" with
    ``single_sentences``. The model needs a head ``next_sentence`` (BertForPreTraining).
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(
        ("unembed", "next_sentence"), ("token_type_ids",), causal=False
    )
    task: ClassVar[str] = "next_sentence"
    """Name of the second loss, and the prefix of its metrics."""
    notes: ClassVar[tuple[str, str]] = ("B follows A", "B is from elsewhere")
    """Meaning of the labels 0 and 1."""

    single_sentences: bool = False
    """A and B are one sentence each; else as many sentences as fit."""
    next_sentence_weight: float = 1.0
    """Coefficient of next-sentence prediction; that of masked language modelling is 1."""

    RANGES: ClassVar[ranges.Ranges] = {"next_sentence_weight": ranges.COEFFICIENT}

    def window_spec(self, sequence_length: int) -> WindowSpec:
        return WindowSpec(
            sequence_length - _FRAMING,
            cross_documents=False,
            sentences=2 if self.single_sentences else None,
            other=self.task == "next_sentence",
            static_epochs=self.static_epochs,
        )

    def predictions(self, sequence_length: int) -> int:
        """Number of masked tokens of a full sequence."""
        return self.count(sequence_length - _FRAMING)

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The arrays of `Masking.mask`; ``token_type_ids`` int32 [T], 1 at B and its [SEP];
        ``next_sentence_labels`` int32 [], 0 if B follows A and else 1, as in Hugging Face; and
        ``next_sentence_weights`` float32 [], 0 without B."""
        cls_id, sep_id = framing_ids(vocab)
        a, b, label = self._pair(example, rng, sequence_length - _FRAMING)
        row = np.concatenate([[cls_id], a, [sep_id], *([b, [sep_id]] if len(b) else [])])
        predictions = self.predictions(sequence_length)
        types = (np.arange(len(row)) >= len(a) + 2).astype(np.int32)
        return {
            **self.mask(row.astype(np.int32), rng, vocab, sequence_length, predictions),
            "token_type_ids": pad(types, sequence_length, 0),
            "next_sentence_labels": np.array(label, np.int32),
            "next_sentence_weights": np.array(len(b) > 0, np.float32),
        }

    def _pair(self, example: Arrays, rng: Rng, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """A and B of at most ``length`` tokens, and the label. B is empty if there is no pair."""
        tokens = example["tokens"]
        cuts = example["sentence_ends"][example["sentence_ends"] < len(tokens)]
        if not len(cuts):
            return tokens, tokens[:0], 0
        cut = int(rng.choice(cuts))
        a, b = tokens[:cut], tokens[cut:]
        inner, other = example["other_sentence_ends"], example["other_tokens"]
        ends = np.append(inner[inner < len(other)], len(other))
        # If the document continues, its next sentence did not fit: the other B is filled as well.
        wanted = len(b) if len(tokens) in example["document_ends"] else length - cut
        span = _sentences(ends, wanted, length - cut, self.single_sentences, rng)
        if span is None:
            return tokens, tokens[:0], 0
        if rng.random() < 0.5:
            return a, b, 0
        return a, other[slice(*span)], 1

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The losses "masked_lm" and ``task``; "loss" and "accuracy" are of the first."""
        from flax_transformers.objectives.cross_entropy import cross_entropy, label_terms

        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        logits_B2 = model.head("next_sentence", params, rngs, hidden_BTD)
        scores = cross_entropy(logits_B2, batch["next_sentence_labels"])
        return self.masked_terms(model, params, hidden_BTD, batch) | label_terms(
            self.task,
            scores,
            batch["next_sentence_weights"],
            coefficient=self.next_sentence_weight,
            prefix=f"{self.task}_",
        )

    def example_views(self, row: Arrays) -> list[ExampleView]:
        view = masked_view(row)
        if not row["next_sentence_weights"]:
            note = "no pair"
        else:
            note = self.notes[int(row["next_sentence_labels"])]
        segments = row["token_type_ids"][: len(view.ids)]
        return [dataclasses.replace(view, segments=segments, note=note)]


@dataclass(frozen=True)
class SentenceOrder(NextSentence):
    """Predict masked tokens of ``[CLS] A [SEP] B [SEP]``, and whether A and B, two successive parts
    of one document, are in order or swapped (ALBERT, arXiv:1909.11942 section 3.1).

    The model needs a head ``next_sentence`` (AlbertForPreTraining). Label 1 means swapped, as in
    Hugging Face.
    """

    task: ClassVar[str] = "sentence_order"
    notes: ClassVar[tuple[str, str]] = ("A and B are in order", "A and B are swapped")

    def _pair(self, example: Arrays, rng: Rng, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        tokens = example["tokens"]
        cuts = example["sentence_ends"][example["sentence_ends"] < len(tokens)]
        if not len(cuts):
            return tokens, tokens[:0], 0
        cut = int(rng.choice(cuts))
        if rng.random() < 0.5:
            return tokens[:cut], tokens[cut:], 0
        return tokens[cut:], tokens[:cut], 1


def _sentences(
    ends: np.ndarray, wanted: int, length: int, single: bool, rng: Rng
) -> tuple[int, int] | None:
    """Start and end of whole sentences of at most ``length`` tokens, as close to ``wanted`` as
    possible; None if no sentence fits.

    They begin at a random sentence after which ``wanted`` tokens are left. It is the first only if
    there is no other, because a true B never begins a window. ``single``: one sentence of any
    length.
    """
    starts = np.append(0, ends[:-1])
    fits = np.flatnonzero(ends - starts <= length)
    if not len(fits):
        return None
    enough = fits if single else fits[starts[fits] <= ends[-1] - wanted]
    later = enough[enough > 0]
    if len(later):
        first = int(rng.choice(later))
    else:
        first = int(fits[0])
    start = int(starts[first])
    lengths = ends[first:] - start
    most = 1 if single else int(np.searchsorted(lengths, length, side="right"))
    return start, start + int(lengths[np.argmin(np.abs(lengths[:most] - wanted))])
