"""Optimizers: one small frozen dataclass per kind, and the chain that all kinds share.

The chain is: clip by global norm -> the kind's own direction, with decoupled weight decay at the
place the kind wants it -> times minus the scheduled learning rate. A further kind is a dataclass
with the shared fields, its own, and ``direction``; nothing else changes. Settings that switch a
link off (no clipping, no decay) leave the optimizer state's tree as it is, so that a checkpoint
restores with them changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from flax_transformers.errors import UserError
from flax_transformers.training.schedules import Schedule, make_schedule


class OptimizerConfig(Protocol):
    """What the shared chain reads of an optimizer, whatever its kind."""

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule."""

    @property
    def schedule(self) -> Schedule:
        """Shape of the learning rate over the run."""

    @property
    def weight_decay(self) -> float:
        """Decay per update, times the learning rate."""

    @property
    def no_decay(self) -> tuple[str, ...]:
        """Names of the parameters that do not decay."""

    @property
    def max_grad_norm(self) -> float | None:
        """Gradients of a larger global norm are scaled down to it; None: never."""

    def direction(self, decay: optax.GradientTransformation) -> optax.GradientTransformation:
        """From (clipped) gradients to the step direction, before the learning rate.

        ``decay`` adds the masked weight decay to what reaches it. Raises UserError for settings
        out of range.
        """


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1412.6980, arXiv:1711.05101), as torch computes it.

    The decay is multiplied by the learning rate and moments are bias-corrected. Moments are
    float32. Defaults are those of BERT (arXiv:1810.04805 §A.2), whose original code leaves out
    the bias correction and lets embeddings decay: ``no_decay=("bias", "scale")`` for the latter.

    ``no_decay`` holds last names of parameters ("kernel", "bias", "scale", "embedding", ...).
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    no_decay: tuple[str, ...] = ("bias", "scale", "embedding")
    max_grad_norm: float | None = 1.0
    schedule: Schedule = field(default_factory=Schedule)

    def direction(self, decay: optax.GradientTransformation) -> optax.GradientTransformation:
        """``m / (sqrt(v) + eps) + weight_decay * parameter``, moments bias-corrected."""
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name} is {value}; it must lie in [0, 1).")
        if not 0 < self.eps < float("inf"):
            raise UserError(f"optimizer.eps is {self.eps}; it must be a positive number.")
        return optax.chain(_scale_by_adam(self.b1, self.b2, self.eps), decay)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`` with float32 moments and optax's state.

    ``optax.scale_by_adam`` forms ``1 - b2^t`` as a float32 difference, which is 3e-5 off at t = 1
    for b2 = 0.999; here it comes from ``expm1`` and the float64 logarithm.
    """
    log_b1, log_b2 = (math.log(b) if b else -math.inf for b in (b1, b2))

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        gradients: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradients)
        correction1, correction2 = -jnp.expm1(count * log_b1), -jnp.expm1(count * log_b2)
        updates = jax.tree.map(
            lambda m, v: m / correction1 / (jnp.sqrt(v / correction2) + eps), mu, nu
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The whole update rule: float32 gradients and parameters in, float32 updates to add out.

    Clipping happens inside, so the norm of the gradients handed in is the unclipped one. Raises
    UserError for settings out of range.
    """
    rate = learning_rate_at(config, total_steps)
    if not 0 <= config.weight_decay < float("inf"):
        raise UserError(
            f"optimizer.weight_decay is {config.weight_decay}; it must be zero or positive."
        )
    clip = optax.identity()
    if config.max_grad_norm is not None:
        if not config.max_grad_norm > 0:
            raise UserError(
                f"optimizer.max_grad_norm is {config.max_grad_norm}; it must be positive, or None "
                "for no clipping."
            )
        clip = optax.clip_by_global_norm(config.max_grad_norm)
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: decay_mask(params, config.no_decay)
    )
    return optax.chain(clip, config.direction(decay), optax.scale_by_learning_rate(rate))


def learning_rate_at(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The function from step, counted from 0, to the learning rate of that step's update."""
    return make_schedule(config.schedule, config.learning_rate, total_steps)


def decay_mask(params: Any, no_decay: Sequence[str]) -> Any:
    """A tree like ``params`` of bools: True where the weight decay applies.

    A parameter is known by its own name, the last dict key on its path, never by its shape or its
    layer: a bias stacked over layers, [L, D], is as much a bias as a single one, [D].
    """

    def decays(path: Sequence[Any], _: Any) -> bool:
        # Parameters may still be boxed with their axis names, which adds a non-dict key at the end.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return not names or names[-1] not in no_decay

    return jax.tree_util.tree_map_with_path(decays, params)
