"""Direct preference optimization: a policy learns preferences without a reward model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

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
from flax_transformers.post_training.chat_data import ConversationSpec
from flax_transformers.post_training.reward_model import Comparisons, comparison_row


@dataclass(frozen=True, kw_only=True)
class DirectPreference(Comparisons):
    """Make better completions more probable than worse ones, compared with a reference model.

    With the log-ratio ``d = log(p(w) / p_ref(w)) - log(p(l) / p_ref(l))`` of a pair, ``loss`` is:

    - "sigmoid": ``-log sigmoid(beta d)`` (DPO, arXiv:2305.18290 equation 7); with
      ``label_smoothing`` s the mean of this and ``-log sigmoid(-beta d)``, with weights 1 - s and s
      (conservative DPO)
    - "hinge": ``max(0, 1 - beta d)`` (arXiv:2305.10425)
    - "ipo": ``(d - 1 / (2 beta)) ** 2`` with log-ratios per token (arXiv:2310.12036)

    The reference's log-probabilities are computed once, before the first step, and stored beside
    the prepared data. All pairs of completions of one prompt together count as one. Dropout is off,
    as in the authors' code: ratios to the reference would be those of its masks.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("segment_ids",), causal=True)

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Share of preferences that are taken to be wrong; for the loss "sigmoid"."""
    reference: str | None = None
    """Run or folder of the reference model. None: the run's own initial model (``init_from``), with
    adapters that which they are added to."""
    max_logits: int = MAX_LOGITS
    """Maximum number of logits on a device at once."""

    RANGES: ClassVar[ranges.Ranges] = {
        "beta": ranges.numbers(0, 1e6, above=True),
        "label_smoothing": ranges.numbers(0, 0.5),
        "max_logits": ranges.integers(1, 2**48),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss != "sigmoid":
            raise ranges.OutOfRange(
                f"objective.label_smoothing is {self.label_smoothing}; it must be 0 with the loss "
                f"{self.loss!r}"
            )

    def window_spec(self, sequence_length: int) -> ConversationSpec:
        return replace(super().window_spec(sequence_length), reference=True)

    def predictions(self, sequence_length: int) -> int:
        """Logits are computed for every position."""
        return sequence_length

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The arrays of `comparison_row`, and ``reference`` float32 [S], the log-probabilities of
        the reference model: not a number if the example has none. Not random."""
        row = comparison_row(example, vocab, sequence_length, self.completions)
        reference = np.zeros(self.completions, np.float32)
        reference[: len(example["ends"])] = example.get("reference", np.float32(np.nan))
        return row | {"reference": reference}

    def complete_data(self, config: Any, prepared: Any, weights: Any, workdir: Any) -> Any:
        """The data with the reference's log-probabilities; see `reference.with_reference`."""
        from flax_transformers.post_training.reference import with_reference

        return with_reference(self, config, prepared, weights, workdir)

    def log_probs(self, model: ModelFunctions, params: Params, batch: Batch) -> tuple[Array, Array]:
        """See the function `log_probs`."""
        return log_probs(model, params, batch, self.max_logits)

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "preference". Metrics of pairs: "loss", "accuracy", "margin", and of the better
        and the worse completion "reward_chosen" and "reward_rejected" (``beta`` times log-ratio),
        "log_prob_chosen" and "log_prob_rejected". "kl": the mean of ``log(p_ref / p)`` of both, in
        nats for each completion; where the reference has sampled them, it is an unbiased estimate
        of the divergence KL(reference || model), and else can also be negative."""
        import jax  # not at the top: data workers must not import jax
        import jax.numpy as jnp

        log_prob_BS, length_BS = self.log_probs(model, params, batch)
        ratio_BS = log_prob_BS - batch["reference"]
        weight_BSS = batch["preferred"]
        per_BS = ratio_BS / jnp.maximum(length_BS, 1.0) if self.loss == "ipo" else ratio_BS
        delta_BSS = per_BS[:, :, None] - per_BS[:, None, :]
        if self.loss == "ipo":
            loss_BSS = jnp.square(delta_BSS - 1 / (2 * self.beta))
        elif self.loss == "hinge":
            loss_BSS = jax.nn.relu(1 - self.beta * delta_BSS)
        else:
            right = jax.nn.log_sigmoid(self.beta * delta_BSS)
            wrong = jax.nn.log_sigmoid(-self.beta * delta_BSS)
            loss_BSS = -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
        count = jnp.sum(weight_BSS)

        def mean(values_BSS: Array) -> tuple[Array, Array]:
            return jnp.sum(values_BSS * weight_BSS), count

        reward_BS = self.beta * ratio_BS
        margin_BSS = reward_BS[:, :, None] - reward_BS[:, None, :]
        metrics = {
            "loss": mean(loss_BSS),
            "accuracy": mean((margin_BSS > 0).astype(jnp.float32)),
            "margin": mean(margin_BSS),
            "kl": mean(-0.5 * (ratio_BS[:, :, None] + ratio_BS[:, None, :])),
            "reward_chosen": mean(reward_BS[:, :, None]),
            "reward_rejected": mean(reward_BS[:, None, :]),
            "log_prob_chosen": mean(log_prob_BS[:, :, None]),
            "log_prob_rejected": mean(log_prob_BS[:, None, :]),
        }
        return LossTerms({"preference": (*mean(loss_BSS), 1.0)}, metrics)


def log_probs(
    model: ModelFunctions, params: Params, batch: Batch, max_logits: int = MAX_LOGITS
) -> tuple[Array, Array]:
    """Log-probability, in nats, and number of the learned tokens of each sequence of a row.

    Both are float32 [B, S], without dropout; 0 where there is no sequence.
    """
    import jax.numpy as jnp

    from flax_transformers.objectives.cross_entropy import lm_scores

    hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
    scores = lm_scores(model.unembedding(params, hidden_BTD), batch["labels"], max_logits)
    weight_BT = batch["label_weights"]
    number_11S = jnp.arange(1, batch["ends"].shape[1] + 1)[None, None]
    of_sequence_BTS = (batch["segment_ids"][:, :, None] == number_11S).astype(jnp.float32)

    def sums(values_BT: Array) -> Array:
        return jnp.sum(values_BT[:, :, None] * of_sequence_BTS, axis=1)

    return -sums(scores.nll * weight_BT), sums(weight_BT)
