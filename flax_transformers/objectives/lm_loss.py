"""Settings of a language-modelling loss, and its terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.objectives.base import Array, LossTerms, ModelFunctions, Params

MAX_LOGITS = 2**28
"""Default number of logits on a device at once: 1 GiB in float32."""

PALM_Z_LOSS = 1e-4
"""Coefficient of the z-loss in PaLM (arXiv:2204.02311 section 5) and T5X."""


@dataclass(frozen=True, kw_only=True)
class LMLoss:
    """Cross-entropy over the vocabulary; the base of objectives of language models.

    The metric "loss" is the plain cross-entropy, without label smoothing and z-loss.
    """

    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary (arXiv:1512.00567 section 7, as
    in PyTorch and Hugging Face; T5X and tensor2tensor spread it over all tokens but the label)."""
    z_loss: float = 0.0
    """Coefficient of the mean of ``log(Z) ** 2``, where Z is the sum of the exponentials of the
    logits; 1e-4 in PaLM (`PALM_Z_LOSS`)."""
    max_logits: int = MAX_LOGITS
    """Maximum number of logits on a device at once, four bytes each; the vocabulary is processed in
    chunks if there are more."""

    RANGES: ClassVar[ranges.Ranges] = {
        "label_smoothing": ranges.RATE,
        "z_loss": ranges.COEFFICIENT,
        "max_logits": ranges.integers(1, 2**48),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def lm_terms(
        self,
        name: str,
        model: ModelFunctions,
        params: Params,
        hidden_BTD: Array,
        labels_BT: Array,
        weights_BT: Array,
    ) -> LossTerms:
        """The trained loss ``name``, "z_loss" if enabled, and the metrics "loss" and "accuracy"."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        from flax_transformers.objectives.cross_entropy import label_terms, lm_scores

        scores = lm_scores(model.unembedding(params, hidden_BTD), labels_BT, self.max_logits)
        terms = label_terms(name, scores, weights_BT, label_smoothing=self.label_smoothing)
        if not self.z_loss:
            return terms
        z_loss = jnp.sum(scores.log_z**2 * weights_BT), jnp.sum(weights_BT), self.z_loss
        return terms | LossTerms({"z_loss": z_loss}, {})
