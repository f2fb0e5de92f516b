"""Tags of words: parts of speech, named entities (BERT, arXiv:1810.04805 section 5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
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
)
from flax_transformers.objectives.labelled import (
    Framing,
    FramingMixin,
    LabelledSpec,
    framed,
    overhead,
)
from flax_transformers.objectives.rows import padded_tokens


@dataclass(frozen=True)
class TokenClassification(FramingMixin):
    """Predict the tag of each word at its first token; its other tokens have no weight.

    The data are tagged sentences (`TaggedSource`). A sentence that is too long becomes several
    examples of whole words, so that every word is tagged once. A word that is longer than a
    sequence is truncated.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("tag",), ("input_ids",))

    label_smoothing: float = 0.0
    """Share of the target that is spread over all tags (arXiv:1512.00567 section 7)."""
    framing: Framing = "bert"
    """Special tokens around a sentence: those of the model's family."""

    RANGES: ClassVar[ranges.Ranges] = {"label_smoothing": ranges.RATE}

    def window_spec(self, sequence_length: int) -> LabelledSpec:
        length = sequence_length - overhead(self.framing, 1)
        if length < 1:
            raise UserError(
                f"sequences of {sequence_length} tokens are too short for a word; use longer ones"
            )
        return LabelledSpec(length, cross_documents=False, rows="words", labels="tags")

    def predictions(self, sequence_length: int) -> int:
        """Every position can have a tag."""
        return sequence_length

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare the words in ``tokens`` int32 [n] that end at ``text_ends`` and have the tags
        ``labels``; not random.

        ``input_ids``, ``attention_mask``, ``labels`` int32 [T] and ``weights`` float32 [T], 1 at
        the first token of a word.
        """
        ids, _, (start,) = framed([example["tokens"]], self.framing, vocab)
        firsts = start + np.append(0, example["text_ends"][:-1])
        labels = np.zeros(sequence_length, np.int32)
        weights = np.zeros(sequence_length, np.float32)
        labels[firsts], weights[firsts] = example["labels"], 1.0
        return padded_tokens(ids, sequence_length, vocab) | {"labels": labels, "weights": weights}

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "tagging"; the metrics "loss" and "accuracy" are of words."""
        from flax_transformers.objectives.cross_entropy import cross_entropy, label_terms

        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        scores = cross_entropy(model.head("tag", params, rngs, hidden_BTD), batch["labels"])
        smoothing = self.label_smoothing
        return label_terms("tagging", scores, batch["weights"], label_smoothing=smoothing)

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` int32 [B, T], the likeliest tags; the ``labels`` and ``weights``."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        predicted = jnp.argmax(model.head("tag", params, {}, hidden_BTD), axis=2)
        return {"predicted": predicted, "labels": batch["labels"], "weights": batch["weights"]}

    def example_views(self, row: Arrays) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        classes = np.where(row["weights"] > 0, row["labels"], -1)[:used]
        return [ExampleView("sentence", row["input_ids"][:used], classes=classes)]
