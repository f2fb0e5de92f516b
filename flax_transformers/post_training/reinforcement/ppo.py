"""Proximal policy optimisation of a language model with a value head.

Shapes are those of ``policy``: R rows of a rollout, B rows of a batch, C tokens of the longest
completion.
"""

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
    Rngs,
)
from flax_transformers.post_training.reinforcement.policy import (
    STATISTICS,
    PolicyObjective,
    label_states,
    ratios,
    statistics_of,
)


@dataclass(frozen=True, kw_only=True)
class ProximalPolicy(PolicyObjective):
    """PPO (arXiv:1707.06347) as in arXiv:2203.02155: each token is an action.

    The reward of a completion counts at its last token. Each token also costs ``kl_coefficient``
    times the difference of its log-probability from that of the model that training started from.
    Advantages are generalised (GAE, arXiv:1506.02438) from the values that the model itself
    predicts, so it needs a value head: ``model.architecture`` "LlamaForCausalLMWithValueHead". All
    losses are means over the tokens of the global batch.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(
        ("unembed", "values"), ("attention_mask",), causal=True
    )

    kl_coefficient: float = 0.05
    """Cost of a nat of divergence from the model that training started from; 0: no reference."""
    discount: float = 1.0
    """Factor of rewards by token."""
    gae_lambda: float = 0.95
    """0: advantages of one step; 1: all rewards to come minus the value."""
    whiten: bool = True
    """Give the advantages of a rollout mean 0 and variance 1."""
    value_coefficient: float = 0.1
    """Of half the squared error of values."""
    value_clip: float = 0.2
    """Values further than this from those of the rollout have no gradient towards their target."""

    RANGES: ClassVar[ranges.Ranges] = {
        "kl_coefficient": ranges.COEFFICIENT,
        "discount": ranges.SHARE,
        "gae_lambda": ranges.SHARE,
        "value_coefficient": ranges.COEFFICIENT,
        "value_clip": ranges.numbers(0, 1e6, above=True),
    }

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient > 0

    @property
    def needs_old(self) -> bool:
        return True

    @property
    def statistics(self) -> list[str]:
        return [*super().statistics, f"{STATISTICS}explained_variance", f"{STATISTICS}kl"]

    def sampled_arrays(self, row: Arrays, rows: int) -> Arrays:
        """Zeros for what rollouts add to rows such as ``row``: arrays [``rows``, ...]."""
        per_token = np.zeros((rows, *row["labels"].shape), np.float32)
        names = ("advantages", "returns", "old_values")
        return super().sampled_arrays(row, rows) | dict.fromkeys(names, per_token)

    def measured(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``log_probs`` and ``values``, float32 [B, C]."""
        hidden_BCD = label_states(model, params, batch)
        log_probs_BC, _ = self.scored(model, params, hidden_BCD, batch)
        values_BC = model.head("values", params, {}, hidden_BCD)
        return {"log_probs": log_probs_BC, "values": values_BC}

    def advantages(self, rewards_R: np.ndarray, rows: Arrays) -> Arrays:
        """``advantages`` and ``returns`` float32 [R, C]: what values should have been.

        Also the share of the variance of returns that values explain, of the whole rollout, and the
        mean difference of log-probabilities from those of the reference.
        """
        mask_RC, values_RC = rows["label_weights"] > 0, rows["old_values"].astype(np.float64)
        kl_RC = np.zeros_like(values_RC)
        if self.needs_reference:
            kl_RC = np.where(mask_RC, rows["old_log_probs"] - rows["reference_log_probs"], 0.0)
        rewards_RC = -self.kl_coefficient * kl_RC
        lengths_R = mask_RC.sum(axis=1)
        written = np.flatnonzero(lengths_R)
        rewards_RC[written, lengths_R[written] - 1] += rewards_R[written]
        values_RC = np.where(mask_RC, values_RC, 0.0)
        advantages_RC = generalized_advantages(
            rewards_RC, values_RC, discount=self.discount, gae_lambda=self.gae_lambda
        )
        returns_RC = advantages_RC + values_RC
        if self.whiten:
            advantages_RC = whitened(advantages_RC, mask_RC)
        rest = np.var((returns_RC - values_RC)[mask_RC]) if mask_RC.any() else 0.0
        variance = np.var(returns_RC[mask_RC]) if mask_RC.any() else 0.0
        explained = 1.0 - rest / variance if variance > 0 else 0.0
        found = {
            "advantages": np.where(mask_RC, advantages_RC, 0.0),
            "returns": np.where(mask_RC, returns_RC, 0.0),
            f"{STATISTICS}explained_variance": np.full(len(rewards_R), explained),
            f"{STATISTICS}kl": kl_RC.sum(axis=1) / np.maximum(lengths_R, 1),
        }
        return {name: array.astype(np.float32) for name, array in found.items()}

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The losses "policy" and "value"; metrics of both, of the entropy, and of the rollout."""
        import jax.numpy as jnp

        weights_BC = batch["label_weights"]
        tokens = jnp.sum(weights_BC)
        hidden_BCD = label_states(model, params, batch)
        log_probs_BC, entropy = self.scored(model, params, hidden_BCD, batch)
        loss_BC, metrics = self.clipped(
            ratios(log_probs_BC, batch), batch["advantages"], weights_BC
        )
        values_BC = model.head("values", params, {}, hidden_BCD)
        error_BC, outside_BC = self._value_errors(values_BC, batch)
        policy, value = (jnp.sum(array * weights_BC) for array in (loss_BC, error_BC))
        return LossTerms(
            losses={
                "policy": (policy, tokens, 1.0),
                "value": (value, tokens, self.value_coefficient),
            },
            metrics=metrics
            | statistics_of(batch)
            | {
                "loss": (policy + self.value_coefficient * value, tokens),
                "policy/entropy": (entropy, tokens),
                "value/loss": (value, tokens),
                "value/clipped": (jnp.sum(outside_BC * weights_BC), tokens),
            },
        )

    def _value_errors(self, values_BC: Array, batch: Batch) -> tuple[Array, Array]:
        """Half the squared errors, the larger ones with and without the clip, float32 [B, C]; and
        where it is that with the clip."""
        import jax.numpy as jnp

        old_BC, returns_BC = batch["old_values"], batch["returns"]
        near_BC = jnp.clip(values_BC, old_BC - self.value_clip, old_BC + self.value_clip)
        plain_BC, clipped_BC = (jnp.square(values - returns_BC) for values in (values_BC, near_BC))
        return 0.5 * jnp.maximum(plain_BC, clipped_BC), clipped_BC > plain_BC


def generalized_advantages(
    rewards_RC: np.ndarray, values_RC: np.ndarray, *, discount: float, gae_lambda: float
) -> np.ndarray:
    """Generalised advantage estimates [R, C] (arXiv:1506.02438, equation 16) of rewards and values,
    both 0 beyond the end of a completion."""
    advantages_RC, following = np.zeros_like(values_RC), np.zeros(len(values_RC))
    next_value = np.zeros(len(values_RC))
    for token in reversed(range(values_RC.shape[1])):
        error = rewards_RC[:, token] + discount * next_value - values_RC[:, token]
        following = error + discount * gae_lambda * following
        advantages_RC[:, token], next_value = following, values_RC[:, token]
    return advantages_RC


def whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``values`` with mean 0 and (unbiased) variance 1 where ``mask`` is True, 0 elsewhere."""
    chosen = values[mask]
    if len(chosen) < 2:
        return np.zeros_like(values)
    return np.where(mask, (values - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0.0)
