"""The tag of each word: parts of speech, names (BERT, arXiv:1810.04805 §5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.labelled import (
    Framing,
    LabelledSpec,
    framed,
    overhead,
)
from flax_transformers.objectives.rows import pad
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class TokenClassification:
    """Tell the tag of each word by its first token; the word's other tokens count for nothing.

    The data are tagged sentences (`TaggedSource`). A sentence that is too long for a row becomes
    several rows of whole words, so that every word is tagged once; of a word that is longer than a
    row by itself, its beginning is there.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("tag",), ("input_ids",))

    label_smoothing: float = 0.0
    """Share of the target that is spread over all tags (arXiv:1512.00567 §7)."""
    framing: Framing = "bert"
    """What stands around a sentence: that of the model's family."""

    RANGES: ClassVar[Ranges] = {"label_smoothing": ranges.RATE}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def window_spec(self, sequence_length: int) -> LabelledSpec:
        length = sequence_length - overhead(self.framing, 1)
        if length < 1:
            raise UserError(f"rows of {sequence_length} tokens hold no word; use longer sequences")
        return LabelledSpec(length, cross_documents=False, rows="words", labels="tags")

    def predictions(self, sequence_length: int) -> int:
        """Every place may have a tag."""
        return sequence_length

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row of the words in ``tokens`` int32 [n] that end at ``text_ends`` and have the tags
        ``labels``; nothing in it is random.

        ``input_ids``, ``attention_mask``, ``labels`` int32 [T] and ``weights`` float32 [T], 1 at
        the first token of a word.
        """
        ids, _, (start,) = framed([example["tokens"]], self.framing, vocab)
        firsts = start + np.append(0, example["text_ends"][:-1])
        labels = np.zeros(sequence_length, np.int32)
        weights = np.zeros(sequence_length, np.float32)
        labels[firsts], weights[firsts] = example["labels"], 1.0
        return {
            "input_ids": pad(ids, sequence_length, vocab.pad_id),
            "attention_mask": pad(np.ones(len(ids), np.int32), sequence_length, 0),
            "labels": labels,
            "weights": weights,
        }

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "tagging"; as metrics the plain cross-entropy of words, and their accuracy."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        scores = cross_entropy(model.head("tag", params, rngs, hidden_BTD), batch["labels"])
        weights_BT = batch["weights"]
        count = jnp.sum(weights_BT)
        loss = jnp.sum(scores.smoothed(self.label_smoothing) * weights_BT)
        return LossTerms(
            losses={"tagging": (loss, count, 1.0)},
            metrics={
                "loss": (jnp.sum(scores.nll * weights_BT), count),
                "accuracy": (jnp.sum(scores.correct * weights_BT), count),
            },
        )

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` int32 [B, T], the likeliest tags, with the batch's ``labels``,
        ``weights``."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        predicted = jnp.argmax(model.head("tag", params, {}, hidden_BTD), axis=2)
        return {"predicted": predicted, "labels": batch["labels"], "weights": batch["weights"]}

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        classes = np.where(row["weights"] > 0, row["labels"], -1)[:used]
        return [ExampleView("sentence", row["input_ids"][:used], classes=classes)]
