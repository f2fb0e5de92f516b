"""The class or number of a text, or of a pair of texts (BERT, arXiv:1810.04805 §4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from flax_transformers.objectives.labelled import Framing, FramingMixin, LabelledSpec, framed_row


@dataclass(frozen=True)
class SequenceClassification(FramingMixin):
    """Predict the class or the number of a text, or of a pair of texts.

    The data are labelled texts (`LabelledSource`). Texts that are too long are truncated, of two
    texts the longer one first; the metric "truncated" is the share of such examples.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("classify",), ("input_ids",))

    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """Cross-entropy of classes, or the squared error of a number (with ``model.num_labels`` 1)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (arXiv:1512.00567 section 7)."""
    framing: Framing = "bert"
    """Special tokens around the texts: those of the model's family."""

    RANGES: ClassVar[ranges.Ranges] = {"label_smoothing": ranges.RATE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss == "mse":
            raise ranges.OutOfRange(
                f"objective.label_smoothing is {self.label_smoothing}; it must be 0 with the loss "
                "'mse'"
            )

    def window_spec(self, sequence_length: int) -> LabelledSpec:
        return LabelledSpec(
            sequence_length,
            cross_documents=False,
            labels="classes" if self.loss == "cross_entropy" else "numbers",
        )

    def predictions(self, sequence_length: int) -> int:
        """One class or number for each example."""
        return 1

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare the texts in ``tokens`` int32 [n] that end at ``text_ends``; not random.

        ``input_ids``, ``attention_mask`` and, with BERT's framing, ``token_type_ids`` int32 [T];
        ``labels`` int32 [], or float32 [] for a number; ``weights`` float32 [], 1; ``truncated``
        float32 [], 1 if the texts were truncated.
        """
        texts = np.split(example["tokens"], example["text_ends"][:-1])
        row, truncated = framed_row(texts, self.framing, vocab, sequence_length)
        return row | {
            "labels": example["labels"][0],
            "weights": np.array(1, np.float32),
            "truncated": np.array(truncated, np.float32),
        }

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "classification" or "regression"; "loss", "accuracy", "truncated" as metrics."""
        return self.label_terms(self._logits(model, params, batch, rngs), batch)

    def label_terms(self, logits_BC: Array, batch: Batch) -> LossTerms:
        """The terms of logits."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        from flax_transformers.objectives.cross_entropy import cross_entropy, label_terms

        weights_B = batch["weights"]
        count = jnp.sum(weights_B)
        truncated = LossTerms({}, {"truncated": (jnp.sum(batch["truncated"]), count)})
        if self.loss == "mse":
            error = jnp.sum(jnp.square(logits_BC[:, 0] - batch["labels"]) * weights_B)
            return truncated | LossTerms(
                {"regression": (error, count, 1.0)}, {"loss": (error, count)}
            )
        scores = cross_entropy(logits_BC, batch["labels"])
        smoothing = self.label_smoothing
        return truncated | label_terms(
            "classification", scores, weights_B, label_smoothing=smoothing
        )

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` [B], the likeliest class int32 or the number float32, and ``logits``
        float32 [B, C]; ``labels`` and ``weights`` of the batch."""
        import jax.numpy as jnp

        logits_BC = self._logits(model, params, batch, {})
        predicted = logits_BC[:, 0] if self.loss == "mse" else jnp.argmax(logits_BC, axis=1)
        of_batch = {name: batch[name] for name in ("labels", "weights")}
        return {"predicted": predicted, "logits": logits_BC, **of_batch}

    def _logits(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Array:
        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        logits_BC = model.head(
            "classify", params, rngs, hidden_BTD, batch["input_ids"], batch["attention_mask"]
        )
        if self.loss == "mse" and logits_BC.shape[1] != 1:
            raise UserError(
                f"objective.loss is 'mse', of one number, but model.num_labels is "
                f"{logits_BC.shape[1]}; set --model.num-labels 1"
            )
        return logits_BC

    def example_views(self, row: Arrays) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        segments = row["token_type_ids"][:used] if "token_type_ids" in row else None
        number = self.loss == "mse"
        return [
            ExampleView(
                "row",
                row["input_ids"][:used],
                segments=segments,
                note=f"{row['labels']:g}" if number else "",
                label=None if number else int(row["labels"]),
            )
        ]
