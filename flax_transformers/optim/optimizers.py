"""Optimizers: one small frozen dataclass per kind, and the chain that all kinds share.

The chain is: clip by global norm -> the kind's own gradient transforms, with decoupled weight decay
where the kind applies it -> times minus the scheduled learning rate and the parameter's own factor.
Another kind is a dataclass with its own fields and ``direction``. Settings that switch a link off
(no clipping, no decay, no factors) keep the tree of the optimizer state, so that a checkpoint
restores with them changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.optim import transforms
from flax_transformers.optim.schedules import LEARNING_RATE, Schedule, ScheduleFactory
from flax_transformers.optim.selection import (
    NO_AXES,
    Axes,
    Name,
    check_kinds,
    check_patterns,
    depths,
    kind_of,
    map_named,
    matches,
    matrix_axes,
    merge,
    partition,
)

Transform: TypeAlias = optax.GradientTransformation


class OptimizerFactory(Protocol):
    """What ``TrainConfig.optimizer`` may be: any frozen dataclass that makes an optax optimizer.

    A method ``learning_rate_at(total_steps)``, where there is one, gives the schedule (step,
    counted from 0, to learning rate) that is logged.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def make(self, total_steps: int) -> Transform:
        """The update rule of a run of ``total_steps`` steps: float32 gradients and parameters in,
        updates to add out."""
        ...


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What the optimizers of this package have in common.

    Patterns select parameters by their path or a folder of it: "words", "*/attention", "*_head".
    """

    learning_rate: float
    """Peak of the schedule."""
    weight_decay: float = 0.0
    """Decay per update, times the learning rate."""
    no_decay: tuple[str, ...] = ("bias", "scale", "embedding")
    """Kinds of parameters that do not decay: "bias", "scale", "embedding" (tables) or "kernel"."""
    max_grad_norm: float | None = None
    """Gradients of a larger global norm are scaled down to it; None: never."""
    schedule: ScheduleFactory = field(default_factory=Schedule)
    layer_decay: float = 1.0
    """The learning rate falls by this factor from each layer to the one below it: heads have all
    of it, the last layer ``layer_decay`` of it, embeddings ``layer_decay ** (layers + 1)``. BEiT
    and MAE count so; in ELECTRA (arXiv:2003.10555) everything below the heads has a power more."""
    rate_factors: tuple[tuple[str, float], ...] = ()
    """(pattern, factor): parameters with a learning rate of their own; the first that fits."""
    frozen: tuple[str, ...] = ()
    """Patterns of the parameters that stay as they are: no gradients, no statistics."""

    RANGES: ClassVar[ranges.Ranges] = {
        "learning_rate": LEARNING_RATE,
        "weight_decay": ranges.numbers(0, 1000),
        "max_grad_norm": ranges.numbers(0, above=True),
        "layer_decay": ranges.numbers(0, 1, above=True),
        "rate_factors": ranges.COEFFICIENT,
        "b1": ranges.RATE,
        "b2": ranges.RATE,
        "eps": ranges.numbers(1e-37, 1),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "optimizer")

    def make(self, total_steps: int, axes: Axes = NO_AXES) -> Transform:
        """The whole update rule: float32 gradients and parameters in, float32 updates to add out.

        Clipping happens inside, so the norm of the gradients handed in is the unclipped one. Frozen
        parameters may be left out of the gradients (``selection.partition``), not of the
        parameters; gradients of theirs count in no norm and give updates of zero. ``axes``, the
        parameters' logical axes (``selection.logical_axes``), tell kernels from tables, biases and
        scales, and the input of a kernel from its output; parameters that have none are known by
        Flax's names. Raises UserError for settings out of range, and ``init`` for patterns that
        match nothing.
        """
        rate = self.learning_rate_at(total_steps)
        clip = optax.identity()
        if self.max_grad_norm is not None:
            clip = transforms.clip_by_global_norm(self.max_grad_norm)
        decay = optax.add_decayed_weights(
            self.weight_decay, mask=lambda params: decay_mask(params, self.no_decay, axes)
        )
        chain = optax.chain(clip, self.direction(decay, axes), optax.scale_by_learning_rate(rate))
        return _per_parameter(chain, self, axes)

    def learning_rate_at(self, total_steps: int) -> optax.Schedule:
        """See ``OptimizerFactory``."""
        return self.schedule.make(self.learning_rate, total_steps)

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """From (clipped) gradients to the step direction, before the learning rate.

        ``decay`` adds the masked weight decay to its input; ``axes``: the parameters' logical axes.
        """
        raise NotImplementedError(f"{type(self).__name__} is no optimizer; choose AdamW, Lion ...")


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (arXiv:1412.6980, arXiv:1711.05101), as torch computes it.

    The decay is multiplied by the learning rate and moments are bias-corrected. Defaults are those
    of BERT (arXiv:1810.04805 §A.2), whose original code leaves out the bias correction and lets
    embeddings decay: ``no_decay=("bias", "scale")`` for the latter.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the first moment is kept in; bfloat16 saves two bytes a parameter. The second is
    float32."""

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """``m / (sqrt(v) + eps) + weight_decay * parameter``, moments bias-corrected."""
        adam = transforms.scale_by_adam(self.b1, self.b2, self.eps, self.first_moment_dtype)
        return optax.chain(adam, decay)


@dataclass(frozen=True, kw_only=True)
class LAMB(OptimizerConfig):
    """AdamW's direction, as long as the parameter itself in each layer (arXiv:1904.00962).

    For large batches. Biases and scales neither decay nor are adapted, as in the authors' code.
    """

    learning_rate: float = 2e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    no_decay: tuple[str, ...] = ("bias", "scale")
    no_adaptation: tuple[str, ...] = ("bias", "scale")
    """Kinds of parameters whose step is not scaled by their norm."""
    max_grad_norm: float | None = 1.0

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """AdamW's direction u, weight decay included, times ``|parameter| / |u|``."""
        return optax.chain(
            transforms.scale_by_adam(self.b1, self.b2, self.eps),
            decay,
            transforms.scale_by_trust_ratio(self.no_adaptation, axes),
        )


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerConfig):
    """The sign of a momentum (arXiv:2302.06675): one float32 statistic where Adam has two.

    The paper takes a rate 3 to 10 times lower than AdamW's, and a decay as much higher.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """``sign(b1 * m + (1 - b1) * gradient) + weight_decay * parameter``."""
        return optax.chain(optax.scale_by_lion(self.b1, self.b2, mu_dtype=jnp.float32), decay)


@dataclass(frozen=True, kw_only=True)
class LARS(OptimizerConfig):
    """Momentum of gradients that are as long as the parameter itself, times a coefficient, in each
    layer (arXiv:1708.03888). As in linear probes of MoCo v3 and MAE (arXiv:2111.06377), the
    learning rate is multiplied after the momentum, and biases and scales are not adapted."""

    learning_rate: float = 0.1
    momentum: float = 0.9
    trust_coefficient: float = 1e-3
    no_adaptation: tuple[str, ...] = ("bias", "scale")
    """Kinds of parameters whose step is not scaled by their norm."""

    RANGES: ClassVar[ranges.Ranges] = {
        "momentum": ranges.RATE,
        "trust_coefficient": ranges.COEFFICIENT,
    }

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """``m = momentum * m + coefficient * |parameter| / |u| * u``, u with the weight decay."""
        ratio = transforms.scale_by_trust_ratio(self.no_adaptation, axes, self.trust_coefficient)
        return optax.chain(decay, ratio, optax.trace(self.momentum))


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Orthogonalized momentum for kernels of layers, and Adam for tables, biases, scales, patches,
    routers and layers of logits (K. Jordan, 2024; ``optax.contrib``).

    A kernel's step has the root mean square of 0.2 that Adam's usually has, so that both share one
    learning rate and weight decay (Moonlight, arXiv:2502.16982).
    """

    learning_rate: float = 3e-4
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0

    RANGES: ClassVar[ranges.Ranges] = {"momentum": ranges.RATE}

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """The nearest orthogonal matrix to ``m``, times ``0.2 * sqrt(max(inputs, outputs))``."""

        def matrices(tree: Any) -> Any:
            def numbers(name: Name, leaf: Any) -> Any:
                own = matrix_axes(name, leaf.ndim, axes)
                return optax.contrib.MuonDimensionNumbers(own.rows, own.columns)

            return map_named(numbers, tree)

        def which(name: Name, leaf: Any) -> str:
            is_layer = _WITH_ADAM.isdisjoint(axes.get(name, ())) and kind_of(name, axes) == "kernel"
            return "muon" if is_layer and matrix_axes(name, leaf.ndim, axes).rows else "adam"

        def scale(name: Name, update: jax.Array) -> jax.Array:
            own = matrix_axes(name, update.ndim, axes)
            sides = [math.prod(update.shape[i] for i in part) for part in (own.rows, own.columns)]
            return update * (0.2 * math.sqrt(max(sides)))

        orthogonal = optax.chain(
            optax.contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=matrices),
            optax.stateless(lambda updates, params: map_named(scale, updates)),
        )
        adam = transforms.scale_by_adam(self.b1, self.b2, self.eps)
        both = optax.partition({"muon": orthogonal, "adam": adam}, lambda p: map_named(which, p))
        return optax.chain(both, decay)


_WITH_ADAM = frozenset({"vocab", "labels", "channels", "router"})
"""Axes of kernels that Muon leaves to Adam."""


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerConfig):
    """Second moments of rows and columns alone, and no first moment (arXiv:1804.04235).

    Defaults are T5's (arXiv:1910.10683 §3.1.2): a rate of ``1 / sqrt(max(step, 10,000))`` times
    the parameter's root mean square, steps counted from 0. The factors of a kernel are those of its
    [input, output] matrix, so of [D, N * H] and [N * H, D] in attention, as in T5X (which, unlike
    this, factors small ones too). The weight decay is multiplied by the learning rate, not by the
    parameter's root mean square.
    """

    learning_rate: float = 1e-2
    decay_exponent: float = 0.8
    eps: float = 1e-30
    """Added to squared gradients."""
    clip_threshold: float | None = 1.0
    """Largest root mean square of a parameter's direction."""
    scale_parameter: bool = True
    """Whether the rate is relative to the parameter's root mean square."""
    least_scale: float = 1e-3
    """Lower bound of that root mean square."""
    min_factored: int = 128
    """A matrix with fewer rows or columns keeps its whole second moment."""
    schedule: ScheduleFactory = field(
        default_factory=lambda: Schedule("inverse_sqrt", timescale=10_000)
    )

    RANGES: ClassVar[ranges.Ranges] = {
        "decay_exponent": ranges.numbers(0, 10, above=True),
        "clip_threshold": ranges.numbers(0, above=True),
        "least_scale": ranges.numbers(0, 1000, above=True),
        "min_factored": ranges.WIDTH,
    }

    def direction(self, decay: Transform, axes: Axes) -> Transform:
        """Gradient over the root of its factored second moment, clipped, scaled, then decay."""
        over_moments = transforms.scale_by_factored_moments
        links = [over_moments(self.decay_exponent, self.eps, self.min_factored, axes)]
        if self.clip_threshold is not None:
            links.append(transforms.clip_by_rms(self.clip_threshold, axes))
        if self.scale_parameter:
            links.append(transforms.scale_by_parameter(self.least_scale, axes))
        return optax.chain(_joined(links), decay)


def learning_rate_at(optimizer: OptimizerFactory, total_steps: int) -> optax.Schedule | None:
    """The function from step, counted from 0, to the learning rate of that step's update.

    It is that of parameters whose own factor (``rate_factors``, ``layer_decay``) is one. None for
    a user's optimizer without the method ``learning_rate_at``.
    """
    schedule = getattr(optimizer, "learning_rate_at", None)
    return None if schedule is None else schedule(total_steps)


def decay_mask(params: Any, no_decay: Sequence[str], axes: Axes = NO_AXES) -> Any:
    """A tree like ``params`` of bools: True where the weight decay applies.

    It applies to all kinds of parameters (``kind_of``) but "fixed" and those in ``no_decay``. A
    bias stacked over layers, [L, D], is as much a bias as a single one, [D].
    """
    return map_named(lambda name, _: kind_of(name, axes) not in (*no_decay, "fixed"), params)


def rate_factors(config: OptimizerConfig, params: Any, axes: Axes = NO_AXES) -> Any:
    """A tree like ``params`` of factors on the learning rate, float64 [] or [L] where stacked."""
    depth, head = depths(params, axes)

    def factor(name: Name, depth: np.ndarray) -> np.ndarray:
        own = next((f for p, f in config.rate_factors if matches(name, p)), 1.0)
        return np.asarray(own * np.power(config.layer_decay, head - depth.astype(np.float64)))

    return map_named(factor, depth)


def _per_parameter(optimizer: Transform, config: OptimizerConfig, axes: Axes) -> Transform:
    """``optimizer`` without the frozen parameters, and with the others' factors on its updates."""

    def init(params: Any) -> Any:
        check_patterns(params, [pattern for pattern, _ in config.rate_factors], "rate_factors")
        check_patterns(params, config.frozen, "frozen")
        for setting in ("no_decay", "no_adaptation"):
            check_kinds(params, getattr(config, setting, ()), setting, axes)
        trained, _ = partition(params, config.frozen)
        if not jax.tree.leaves(trained):
            raise UserError("optimizer.frozen matches every parameter; leave some to train.")
        return optimizer.init(trained)

    def scale(update: jax.Array, factor: np.ndarray) -> jax.Array:
        over_layers = np.asarray(factor, np.float32).reshape(-1, *[1] * (update.ndim - factor.ndim))
        return update * (over_layers if factor.ndim else np.float32(factor))

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        trained, _ = partition(params, config.frozen)
        gradients_of_trained, _ = partition(gradients, config.frozen)
        updates, state = optimizer.update(gradients_of_trained, state, trained)
        if config.layer_decay != 1 or config.rate_factors:
            factors, _ = partition(rate_factors(config, params, axes), config.frozen)
            updates = jax.tree.map(scale, updates, factors)
        return merge(updates, jax.tree.map(jnp.zeros_like, gradients)), state

    return Transform(init, update)


def _joined(links: Sequence[Transform]) -> Transform:
    """The links in turn, of which only the first has a state: that state is the whole."""
    first, *rest = links

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = first.update(updates, state, params)
        for link in rest:
            updates, _ = link.update(updates, optax.EmptyState(), params)
        return updates, state

    return Transform(first.init, update)
