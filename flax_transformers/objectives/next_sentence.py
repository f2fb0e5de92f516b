"""BERT's two objectives at once (arXiv:1810.04805 §3.1): gaps, and whether B follows A."""

from __future__ import annotations

import dataclasses
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
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.masked_lm import Masking, shown_masks
from flax_transformers.objectives.rows import framing_ids, pad
from flax_transformers.ranges import Ranges

_FRAMING = 3  # [CLS] A [SEP] B [SEP]


@dataclass(frozen=True)
class NextSentence(Masking):
    """Fill gaps in ``[CLS] A [SEP] B [SEP]``, and tell whether B followed A in the text.

    A window of one document is divided at a random sentence end. In every second pair, drawn by
    lot, B is what follows; in the others it comes from a random window of another document: whole
    sentences from a random one on, as many as fit, or about as long as the true B where that ends
    its document.

    Nothing but the words is to tell the two kinds apart. So no pair is cut to fit, where BERT's own
    code takes tokens from the longer of A and B. And where only one kind can be made, because the
    window holds one sentence or no sentence of the other window fits, the window becomes
    ``[CLS] A [SEP]`` with masks and counts for nothing in next-sentence prediction. (BERT's code
    gives single sentences a random B, so that fewer than half of its pairs are true.) The part of
    a window that another B replaces has its turn in other epochs, where BERT's code goes back to it
    at once. No row is made shorter than it could be, as one in ten is in BERT.

    RoBERTa (arXiv:1907.11692 §4.2) calls this "segment-pair", and with ``single_sentences``
    "sentence-pair". The model needs a head ``next_sentence`` (BertForPreTraining).
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(
        ("unembed", "next_sentence"), ("token_type_ids",), causal=False
    )

    single_sentences: bool = False
    """A and B are one sentence each; else as many as fit."""
    next_sentence_weight: float = 1.0
    """Coefficient of next-sentence prediction, where that of filling gaps is 1."""
    static_epochs: int | None = None
    """Static masking: the same pairs and masks come round again after so many epochs. None: always
    new ones."""

    RANGES: ClassVar[Ranges] = {"next_sentence_weight": ranges.COEFFICIENT}

    def window_spec(self, sequence_length: int) -> WindowSpec:
        return WindowSpec(
            sequence_length - _FRAMING,
            cross_documents=False,
            sentences=2 if self.single_sentences else None,
            other=True,
            static_epochs=self.static_epochs,
        )

    def predictions(self, sequence_length: int) -> int:
        """Chosen tokens in a full row; the answer about the pair costs next to nothing."""
        return self.count(sequence_length - _FRAMING)

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """The arrays of ``Masking.masked_row``, and with them ``token_type_ids`` int32 [T], 1 at B
        and its [SEP]; ``next_sentence_labels`` int32 [], 0 where B follows and 1 where it does not,
        as in Hugging Face; and ``next_sentence_weights`` float32 [], 0 where there is no B."""
        cls_id, sep_id = framing_ids(vocab)
        a, b, label = self._pair(example, rng, sequence_length - _FRAMING)
        row = np.concatenate([[cls_id], a, [sep_id], *([b, [sep_id]] if len(b) else [])])
        slots = self.predictions(sequence_length)
        types = (np.arange(len(row)) >= len(a) + 2).astype(np.int32)
        return {
            **self.masked_row(row.astype(np.int32), rng, vocab, sequence_length, slots),
            "token_type_ids": pad(types, sequence_length, 0),
            "next_sentence_labels": np.array(label, np.int32),
            "next_sentence_weights": np.array(len(b) > 0, np.float32),
        }

    def _pair(
        self, example: dict[str, np.ndarray], rng: np.random.Generator, room: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """A, B and the label: 0 where B follows A. B is empty where there is no pair."""
        tokens = example["tokens"]
        cuts = example["sentence_ends"][example["sentence_ends"] < len(tokens)]
        if not len(cuts):
            return tokens, tokens[:0], 0
        cut = int(rng.choice(cuts))
        a, b = tokens[:cut], tokens[cut:]
        inner, other = example["other_sentence_ends"], example["other_tokens"]
        ends = np.append(inner[inner < len(other)], len(other))
        # Where the document goes on, its next sentence did not fit: B is filled up likewise.
        wanted = len(b) if len(tokens) in example["document_ends"] else room - cut
        stretch = _stretch(ends, wanted, room - cut, self.single_sentences, rng)
        if stretch is None:
            return tokens, tokens[:0], 0
        if rng.random() < 0.5:
            return a, b, 0
        return a, other[slice(*stretch)], 1

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The losses "masked_lm" and "next_sentence"; "loss" and "accuracy" are of filling gaps."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        terms = self.masked_terms(model, params, hidden_BTD, batch)
        logits_B2 = model.head("next_sentence", params, rngs, hidden_BTD)
        scores = cross_entropy(logits_B2, batch["next_sentence_labels"])
        weights_B = batch["next_sentence_weights"]
        pairs = jnp.sum(weights_B)
        loss = jnp.sum(scores.nll * weights_B)
        terms.losses["next_sentence"] = (loss, pairs, self.next_sentence_weight)
        terms.metrics["next_sentence_loss"] = (loss, pairs)
        terms.metrics["next_sentence_accuracy"] = (jnp.sum(scores.correct * weights_B), pairs)
        return terms

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        shown = shown_masks(row)
        if not row["next_sentence_weights"]:
            note = "no pair"
        else:
            note = "B is from elsewhere" if row["next_sentence_labels"] else "B follows A"
        segments = row["token_type_ids"][: len(shown.ids)]
        return [dataclasses.replace(shown, segments=segments, note=note)]


def _stretch(
    ends: np.ndarray, wanted: int, room: int, single: bool, rng: np.random.Generator
) -> tuple[int, int] | None:
    """Start and end of whole sentences in ``room`` tokens, as near to ``wanted`` as can be.

    They begin at a random sentence from which enough is left; at the first only where it must be,
    as B never begins a window where it follows A. ``single``: one sentence of any length. None:
    no sentence fits.
    """
    starts = np.append(0, ends[:-1])
    fits = np.flatnonzero(ends - starts <= room)
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
    most = 1 if single else int(np.searchsorted(lengths, room, side="right"))
    return start, start + int(lengths[np.argmin(np.abs(lengths[:most] - wanted))])
