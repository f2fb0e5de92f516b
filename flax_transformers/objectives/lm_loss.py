"""Settings of a loss over words, and the terms that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.objectives.base import Array, LossTerms, ModelFunctions, Params
from flax_transformers.ranges import Ranges

LOGITS_HELD = 2**28
"""Logits that a device holds at once, unless told otherwise: 1 GiB in float32."""

PALM_Z_LOSS = 1e-4
"""Coefficient of the z-loss in PaLM (arXiv:2204.02311 §5) and T5X."""


@dataclass(frozen=True, kw_only=True)
class LMLoss:
    """Cross-entropy at many places of a row; what objectives of language models have in common.

    What is logged as "loss" is the plain cross-entropy, whatever is trained.
    """

    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary (arXiv:1512.00567 §7, as in
    PyTorch and Hugging Face; T5X and tensor2tensor spread it over all but the label)."""
    z_loss: float = 0.0
    """Coefficient of the mean of ``log(Z) ** 2``, Z the sum of the exponentials of the logits;
    PaLM has 1e-4 (`PALM_Z_LOSS`)."""
    max_logits: int = LOGITS_HELD
    """Logits that a device holds at once, four bytes each; more are made some words at a time."""

    RANGES: ClassVar[Ranges] = {
        "label_smoothing": ranges.RATE,
        "z_loss": ranges.COEFFICIENT,
        "max_logits": ranges.integers(1, 2**48),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def word_terms(
        self,
        name: str,
        model: ModelFunctions,
        params: Params,
        hidden_BTD: Array,
        labels_BT: Array,
        weights_BT: Array,
    ) -> LossTerms:
        """The trained loss ``name`` and perhaps ``z_loss``; the metrics "loss" and "accuracy"."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import word_scores

        scores = word_scores(model.unembedding(params, hidden_BTD), labels_BT, self.max_logits)

        def total(values_BT: Array) -> Array:
            return jnp.sum(values_BT * weights_BT)

        count = jnp.sum(weights_BT)
        losses = {name: (total(scores.smoothed(self.label_smoothing)), count, 1.0)}
        if self.z_loss:
            losses["z_loss"] = (total(scores.log_z**2), count, self.z_loss)
        metrics = {"loss": (total(scores.nll), count), "accuracy": (total(scores.correct), count)}
        return LossTerms(losses, metrics)
