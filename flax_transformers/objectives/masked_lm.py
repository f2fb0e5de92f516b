"""Masked language modelling (BERT, arXiv:1810.04805 §3.1), with masks drawn anew each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import (
    Array,
    Batch,
    ModelFunctions,
    Params,
    Terms,
    Vocabulary,
    WindowSpec,
)


@dataclass(frozen=True)
class MaskedLM:
    """Predict some tokens of a row from all the others.

    Of the tokens of each row ``mask_fraction`` are chosen, an exact count. A chosen token becomes
    [MASK] with ``mask_share``, a random ordinary token with ``random_share``, else stays.
    Special tokens and padding are never chosen.
    """

    mask_fraction: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    cross_documents: bool = True
    """Fill rows across document ends, with a separator there, or keep to one document a row."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_fraction < 1.0:
            raise ValueError(
                f"objective.mask_fraction is {self.mask_fraction}; it must be between 0 and 1"
            )
        shares = (self.mask_share, self.random_share)
        if not (min(shares) >= 0.0 and sum(shares) <= 1.0):
            raise ValueError(
                f"objective.mask_share {self.mask_share} and objective.random_share "
                f"{self.random_share} must not be negative and must add up to at most 1"
            )

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # [CLS] in front and [SEP] at the end take two places.
        return WindowSpec(sequence_length - 2, self.cross_documents)

    def predictions(self, sequence_length: int) -> int:
        """Chosen tokens in a full row: the width M of the arrays that hold them."""
        return self._count(sequence_length - 2)

    def _count(self, tokens: int) -> int:
        return max(1, round(self.mask_fraction * tokens)) if tokens else 0

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row: ``input_ids``, ``attention_mask`` int32 [T]; ``masked_positions``,
        ``masked_labels`` int32 [M] and ``masked_weights`` float32 [M], 0 where M is not filled."""
        if vocab.mask_id is None:
            raise UserError(
                "the tokenizer has no [MASK], which masked language modelling needs; choose another"
            )
        row = frame(example, vocab)
        ordinary = np.flatnonzero(~np.isin(row, vocab.special_ids))
        chosen = np.sort(rng.permutation(ordinary)[: self._count(len(ordinary))])
        labels = row[chosen]
        draw = rng.random(len(chosen))
        masked = draw < self.mask_share
        replaced = ~masked & (draw < self.mask_share + self.random_share)
        row[chosen[masked]] = vocab.mask_id
        row[chosen[replaced]] = random_ordinary(rng, int(replaced.sum()), vocab)

        slots = self.predictions(sequence_length)
        return {
            "input_ids": pad(row, sequence_length, vocab.pad_id),
            "attention_mask": pad(np.ones(len(row), np.int32), sequence_length, 0),
            "masked_positions": pad(chosen, slots, 0),
            "masked_labels": pad(labels, slots, 0),
            "masked_weights": pad(np.ones(len(chosen), np.float32), slots, 0),
        }

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Terms:
        """Cross-entropy and accuracy at the chosen positions; only their logits are computed."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        hidden_BTD = model.hidden_states(params, batch, rngs)
        positions_BM = batch["masked_positions"]
        chosen_BMD = jnp.take_along_axis(hidden_BTD, positions_BM[:, :, None], axis=1)
        logits_BMV = model.unembed(params, chosen_BMD)
        nll_BM, correct_BM = cross_entropy(logits_BMV, batch["masked_labels"])
        weights_BM = batch["masked_weights"]
        count = jnp.sum(weights_BM)
        loss = jnp.sum(nll_BM * weights_BM)
        return Terms(
            losses={"masked_lm": (loss, count, 1.0)},
            metrics={
                "loss": (loss, count),
                "accuracy": (jnp.sum(correct_BM * weights_BM), count),
            },
        )


def frame(example: dict[str, np.ndarray], vocab: Vocabulary) -> np.ndarray:
    """[CLS] tokens [SEP], with a further [SEP] after each document that ends inside; int32."""
    if vocab.cls_id is None or vocab.sep_id is None:
        raise UserError(
            "the tokenizer has no [CLS] and [SEP], which rows of this objective begin and end "
            "with; choose another"
        )
    tokens, ends = example["tokens"], example["document_ends"]
    inside = ends[ends < len(tokens)]
    body = np.insert(tokens, inside, vocab.sep_id)
    return np.concatenate([[vocab.cls_id], body, [vocab.sep_id]]).astype(np.int32)


def random_ordinary(rng: np.random.Generator, count: int, vocab: Vocabulary) -> np.ndarray:
    """``count`` ids drawn evenly from those that are not special, int32."""
    special = np.sort(np.asarray(vocab.special_ids, np.int64))
    ids = rng.integers(0, vocab.size - len(special), count)
    # Step over the special ids below each draw, in rising order.
    for special_id in special:
        ids += ids >= special_id
    return ids.astype(np.int32)


def pad(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """``values`` and then ``fill`` up to ``length``; integers become int32."""
    dtype = np.float32 if values.dtype == np.float32 else np.int32
    row = np.full(length, fill, dtype)
    row[: len(values)] = values
    return row
