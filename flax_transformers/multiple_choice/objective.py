"""Which of several texts goes with a text (BERT, arXiv:1810.04805 §4.4)."""

from __future__ import annotations

from collections.abc import Mapping
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
from flax_transformers.objectives.labelled import Framing, FramingMixin, LabelledSpec, framed_row


@dataclass(frozen=True)
class MultipleChoice(FramingMixin):
    """Predict which choice is right, by a softmax over one score for each.

    The data are questions with choices (`ChoiceSource`). Each choice is a sequence of its own, with
    the shared text before it. Texts that are too long are truncated, the longer one first; the
    metric "truncated" is the share of examples with such a choice.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("choose",), ("input_ids",))

    choices: int = 4
    """Largest number of choices; an example may have fewer."""
    framing: Framing = "bert"
    """Special tokens around the texts: those of the model's family."""

    RANGES: ClassVar[ranges.Ranges] = {"choices": ranges.integers(2, 1024)}

    def window_spec(self, sequence_length: int) -> LabelledSpec:
        return LabelledSpec(
            sequence_length,
            cross_documents=False,
            rows="choices",
            labels="choices",
            choices=self.choices,
        )

    def predictions(self, sequence_length: int) -> int:
        """One score for each choice."""
        return self.choices

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare the texts in ``tokens`` int32 [n] that end at ``text_ends``, the shared one
        first; not random.

        ``input_ids``, ``attention_mask`` and, with BERT's framing, ``token_type_ids`` int32 [C, T],
        of zeros where there is no choice; ``labels`` int32 [], the right choice; ``weights``
        float32 [], 1; ``truncated`` float32 [], 1 if a choice was truncated.
        """
        shared, *choices = np.split(example["tokens"], example["text_ends"][:-1])
        if len(choices) > self.choices:
            raise UserError(
                f"an example has {len(choices)} choices, but objective.choices is {self.choices}; "
                f"set --objective.choices {len(choices)}"
            )
        framed = [
            framed_row([shared, one], self.framing, vocab, sequence_length) for one in choices
        ]
        rows = [row for row, _ in framed]
        empty = {name: np.zeros_like(values) for name, values in rows[0].items()}
        rows += [empty] * (self.choices - len(rows))
        return {name: np.stack([row[name] for row in rows]) for name in empty} | {
            "labels": example["labels"][0],
            "weights": np.array(1, np.float32),
            "truncated": np.array(any(cut for _, cut in framed), np.float32),
        }

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "multiple_choice"; it, "accuracy" and "truncated" are the metrics."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        from flax_transformers.objectives.cross_entropy import cross_entropy, label_terms

        scores = cross_entropy(self._logits(model, params, batch, rngs), batch["labels"])
        count = jnp.sum(batch["weights"])
        truncated = LossTerms({}, {"truncated": (jnp.sum(batch["truncated"]), count)})
        return truncated | label_terms("multiple_choice", scores, batch["weights"])

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``predicted`` int32 [B], the likeliest choice, and ``logits`` float32 [B, C], the lowest
        float32 where there is no choice; ``labels`` and ``weights`` of the batch."""
        import jax.numpy as jnp

        logits_BC = self._logits(model, params, batch, {})
        of_batch = {name: batch[name] for name in ("labels", "weights")}
        return {"predicted": jnp.argmax(logits_BC, axis=1), "logits": logits_BC, **of_batch}

    def _logits(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Array:
        import jax.numpy as jnp

        mask_BCT = batch["attention_mask"]
        names = ("input_ids", "attention_mask", "token_type_ids")
        rows = {name: batch[name].reshape(-1, mask_BCT.shape[2]) for name in names if name in batch}
        # Without a choice, the first position: no sequence is without a token to attend to.
        rows["attention_mask"] = jnp.asarray(rows["attention_mask"]).at[:, 0].set(1)
        hidden_NTD = model.hidden_states(params, rows, rngs).last_hidden_state
        scores_N = model.head(
            "choose", params, rngs, hidden_NTD, rows["input_ids"], rows["attention_mask"]
        )
        exists_BC = jnp.any(mask_BCT > 0, axis=2).at[:, 0].set(True)  # in an empty example, too
        lowest = jnp.finfo(jnp.float32).min
        return jnp.where(exists_BC, scores_N.reshape(exists_BC.shape), lowest)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        used = row["attention_mask"].sum(axis=1)
        segments = row.get("token_type_ids", np.zeros_like(row["input_ids"]))
        return [
            ExampleView(
                f"choice {number + 1}",
                row["input_ids"][number, :length],
                segments=segments[number, :length] if "token_type_ids" in row else None,
                note="right" if number == row["labels"] else "",
            )
            for number, length in enumerate(used.tolist())
            if length
        ]
