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
    longest_first,
    overhead,
)
from flax_transformers.objectives.rows import pad
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class SequenceClassification:
    """Tell the class of a text, or of a pair of texts; or come near to its number.

    The data are labelled texts (`LabelledSource`). What is too long for a row is cut, of two texts
    the longer first; the metric "truncated" is the share of rows that were.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("classify",), ("input_ids",))

    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """Of classes, or the squared error of a number (``model.num_labels`` is 1 then)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (arXiv:1512.00567 §7)."""
    framing: Framing = "bert"
    """What stands around the texts: that of the model's family."""

    RANGES: ClassVar[Ranges] = {"label_smoothing": ranges.RATE}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")
        if self.label_smoothing and self.loss == "mse":
            raise ValueError(
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
        """One class, or number, for a row."""
        return 1

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row of the texts in ``tokens`` int32 [n] that end at ``text_ends``; nothing in it is
        random.

        ``input_ids``, ``attention_mask`` and, with BERT's framing, ``token_type_ids`` int32 [T];
        ``labels`` int32 [], or float32 [] for a number; ``weights`` float32 [], 1; ``truncated``
        float32 [], 1 where the texts were cut.
        """
        texts = np.split(example["tokens"], example["text_ends"][:-1])
        lengths = [len(text) for text in texts]
        room = sequence_length - overhead(self.framing, len(texts))
        if room < len(texts):
            raise UserError(f"rows of {sequence_length} tokens hold no text; use longer sequences")
        kept = longest_first(lengths, room)
        texts = [text[:length] for text, length in zip(texts, kept, strict=True)]
        ids, types, _ = framed(texts, self.framing, vocab)
        row = {
            "input_ids": pad(ids, sequence_length, vocab.pad_id),
            "attention_mask": pad(np.ones(len(ids), np.int32), sequence_length, 0),
            "labels": example["labels"][0],
            "weights": np.array(1, np.float32),
            "truncated": np.array(kept != lengths, np.float32),
        }
        if self.framing == "bert":
            row["token_type_ids"] = pad(types, sequence_length, 0)
        return row

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "classification", or "regression"; as metrics the plain loss, and accuracy."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        logits_BC = self._logits(model, params, batch, rngs)
        weights_B = batch["weights"]
        count = jnp.sum(weights_B)
        truncated = {"truncated": (jnp.sum(batch["truncated"]), count)}
        if self.loss == "mse":
            error = jnp.sum(jnp.square(logits_BC[:, 0] - batch["labels"]) * weights_B)
            return LossTerms(
                {"regression": (error, count, 1.0)}, {"loss": (error, count), **truncated}
            )
        scores = cross_entropy(logits_BC, batch["labels"])
        loss = jnp.sum(scores.smoothed(self.label_smoothing) * weights_B)
        return LossTerms(
            losses={"classification": (loss, count, 1.0)},
            metrics={
                "loss": (jnp.sum(scores.nll * weights_B), count),
                "accuracy": (jnp.sum(scores.correct * weights_B), count),
                **truncated,
            },
        )

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` [B]: int32, the likeliest class, or float32, the number; with the
        ``labels`` and ``weights`` of the batch."""
        import jax.numpy as jnp

        logits_BC = self._logits(model, params, batch, {})
        predicted = logits_BC[:, 0] if self.loss == "mse" else jnp.argmax(logits_BC, axis=1)
        return {"predicted": predicted, "labels": batch["labels"], "weights": batch["weights"]}

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

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        segments = row["token_type_ids"][:used] if "token_type_ids" in row else None
        shown = ExampleView("row", row["input_ids"][:used], segments=segments)
        if self.loss == "mse":
            return [
                ExampleView(shown.name, shown.ids, segments=segments, note=f"{row['labels']:g}")
            ]
        return [ExampleView(shown.name, shown.ids, segments=segments, label=int(row["labels"]))]
