"""Replaced-token detection with a generator (ELECTRA, arXiv:2003.10555)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.lm_loss import MAX_LOGITS
from flax_transformers.objectives.masked_lm import MaskedLM


@dataclass(frozen=True)
class ReplacedTokenDetection(MaskedLM):
    """Predict masked tokens with a generator, put tokens drawn from its predictions in their place,
    and tell for every token whether it was replaced.

    The generator learns as a masked language model, and no gradient passes through the draws
    (section 2). A draw that is the original token counts as not replaced. The random numbers of the
    draws are part of an example, so that they do not depend on micro-batches or devices. The
    generator's logits are held whole, float32 [B, M, V] for M masked positions.

    The defaults are those of the authors' code for the small and base sizes; the large size masks
    25 %. The model needs a generator (ElectraWithGenerator).
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(
        ("generate", "replaced"), ("attention_mask",), causal=False
    )

    mask_share: float = 0.85
    """Share of the selected tokens that become [MASK]; the generator predicts all of them."""
    random_share: float = 0.0
    """Share of the selected tokens that the generator sees as a random token."""
    detection_weight: float = 50.0
    """Coefficient of the discriminator's loss; that of the generator is 1."""

    RANGES: ClassVar[ranges.Ranges] = {"detection_weight": ranges.COEFFICIENT}

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The arrays of `Masking.mask`, and ``draws`` float32 [M], uniform in [0, 1)."""
        row = super().prepare(example, rng, vocab, sequence_length)
        return row | {"draws": rng.random(len(row["masked_labels"]), np.float32)}

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The losses "generator" and "detection". The metrics "loss" and "accuracy" are the
        generator's; "detection_loss" and "detection_accuracy" are means over tokens,
        "detection_recall" over the replaced ones, and "replaced_share" is their share."""
        import jax
        import jax.numpy as jnp
        import optax

        from flax_transformers.objectives.cross_entropy import label_terms, lm_scores

        rngs_of_generator = jax.tree.map(lambda key: jax.random.fold_in(key, 1), dict(rngs))
        unembedding = model.head(
            "generate", params, rngs_of_generator,
            batch["input_ids"], batch["attention_mask"], batch["masked_positions"],
        )  # fmt: skip
        scores = lm_scores(unembedding, batch["masked_labels"], MAX_LOGITS)
        drawn_BM = draw(jax.lax.stop_gradient(unembedding.logits()), batch["draws"])
        drawn_BM = jnp.minimum(drawn_BM, unembedding.size - 1)
        original_BT = put(batch, batch["masked_labels"])
        ids_BT = put(batch, drawn_BM)
        corrupted = {**batch, "input_ids": ids_BT}
        hidden_BTD = model.hidden_states(params, corrupted, rngs).last_hidden_state
        logits_BT = model.head("replaced", params, rngs, hidden_BTD)
        replaced_BT = (ids_BT != original_BT).astype(jnp.float32)
        weights_BT = batch["attention_mask"].astype(jnp.float32)
        loss_BT = optax.sigmoid_binary_cross_entropy(logits_BT, replaced_BT)
        loss, count = jnp.sum(loss_BT * weights_BT), jnp.sum(weights_BT)
        correct_BT = ((logits_BT > 0) == (replaced_BT > 0)) * weights_BT
        replaced = jnp.sum(replaced_BT * weights_BT)
        return label_terms("generator", scores, batch["masked_weights"]) | LossTerms(
            losses={"detection": (loss, count, self.detection_weight)},
            metrics={
                "detection_loss": (loss, count),
                "detection_accuracy": (jnp.sum(correct_BT), count),
                "detection_recall": (jnp.sum(correct_BT * replaced_BT), replaced),
                "replaced_share": (replaced, count),
            },
        )


def draw(logits_BMV: Array, draws_BM: Array) -> Array:
    """Entries int [B, M] drawn from the softmax of the logits by uniform numbers in [0, 1): the
    first whose cumulative probability is greater."""
    import jax
    import jax.numpy as jnp

    total_BMV = jnp.cumsum(jax.nn.softmax(logits_BMV), axis=-1)
    return jnp.sum(total_BMV <= draws_BM[..., None] * total_BMV[..., -1:], axis=-1)


def put(batch: Batch, tokens_BM: Array) -> Array:
    """The ids [B, T] of a batch with other tokens at its masked positions."""
    import jax
    import jax.numpy as jnp

    ids_BT = batch["input_ids"]
    # Entries without weight go beyond the end, where they are dropped.
    positions_BM = jnp.where(
        batch["masked_weights"] > 0, batch["masked_positions"], ids_BT.shape[1]
    )

    def one(ids_T: Array, positions_M: Array, tokens_M: Array) -> Array:
        return ids_T.at[positions_M].set(tokens_M.astype(ids_T.dtype), mode="drop")

    return jax.vmap(one)(ids_BT, positions_BM, tokens_BM)
