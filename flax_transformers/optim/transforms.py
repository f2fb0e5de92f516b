"""Gradient transforms of the optimizers.

Statistics that are taken over a parameter (the norms of LAMB, the row and column means and the root
mean squares of Adafactor) are taken over one layer's parameter, and one expert's, however many lie
stacked in one array: the numbers are those of the same layers unstacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_transformers.optim.selection import (
    NO_AXES,
    Axes,
    MatrixAxes,
    Name,
    kind_of,
    map_named,
    matrix_axes,
)


def scale_by_adam(
    b1: float, b2: float, eps: float, first_moment_dtype: str = "float32"
) -> optax.GradientTransformation:
    """``m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`` with optax's state.

    All is computed in float32. The first moment m may be kept in bfloat16; the second is float32,
    for its steps of ``1 - b2`` are lost in less.

    ``optax.scale_by_adam`` forms ``1 - b2^t`` as a float32 difference, which is 3e-5 off at t = 1
    for b2 = 0.999; here it comes from ``expm1`` and the float64 logarithm.
    """
    log_b1, log_b2 = (math.log(b) if b else -math.inf for b in (b1, b2))

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = optax.tree.zeros_like(params, dtype=jnp.dtype(first_moment_dtype))
        nu = optax.tree.zeros_like(params, dtype=jnp.float32)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        gradients: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(
            lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mu, gradients
        )
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradients)
        correction1, correction2 = (-1 / jnp.expm1(count * log_b) for log_b in (log_b1, log_b2))
        updates = jax.tree.map(
            lambda m, v: m * correction1 / (jnp.sqrt(v * correction2) + eps), mu, nu
        )
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients times ``max_norm / norm`` if their global norm is larger, with optax's state.

    ``optax.clip_by_global_norm`` divides each element, which compilers do not fuse into several
    readers: the CPU backend writes the clipped gradients to memory.
    """

    def clip(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda gradient: gradient * factor, updates)

    return optax.stateless(clip)


def scale_by_trust_ratio(
    no_adaptation: Sequence[str], axes: Axes = NO_AXES, coefficient: float = 1.0
) -> optax.GradientTransformation:
    """Times ``coefficient * |parameter| / |direction|`` (LAMB, arXiv:1904.00962 algorithm 2, phi
    the identity).

    The ratio is one where either norm is zero, as of a bias at the start, and for the parameters
    whose kind (``kind_of``) is in ``no_adaptation``.
    """

    def adapt(name: Name, direction: jax.Array, parameter: jax.Array) -> jax.Array:
        if kind_of(name, axes) in no_adaptation:
            return direction
        own = matrix_axes(name, parameter.ndim, axes)
        size, length = (jnp.sqrt(_sum_squares(x, own)) for x in (parameter, direction))
        known = (size > 0) & (length > 0)
        return direction * jnp.where(known, coefficient * size / jnp.where(known, length, 1), 1)

    return optax.stateless(lambda updates, params: map_named(adapt, updates, params))


class FactoredState(NamedTuple):
    """Second moments of Adafactor: means over columns and rows, or whole where not factored.

    Each tree is shaped like the parameters and empty where another one holds the moment.
    """

    updates: jax.Array
    row: Any
    column: Any
    full: Any


class _Moment(NamedTuple):
    """One parameter's part of the state; not a pytree to ``jax.tree.map`` with ``is_leaf``."""

    row: Any
    column: Any
    full: Any


def scale_by_factored_moments(
    exponent: float, eps: float, min_factored: int, logical: Axes = NO_AXES
) -> optax.GradientTransformation:
    """The gradient over the root of its second moment, kept as two means (arXiv:1804.04235).

    The decay at update t, counted from 1, is ``1 - t ** -exponent`` (§7.2), so that the first
    update sees its own gradient alone and nothing needs bias correction. A kernel is factored as
    its [input, output] matrix, ``selection.matrix_axes``, without being reshaped: the moments of
    [D, N, H] are one [D] and one [N, H]. That is what T5X does with its rules by axis name. A
    matrix with fewer than ``min_factored`` rows or columns is not factored.
    """

    def axes_to_factor(name: Name, shape: tuple[int, ...]) -> MatrixAxes | None:
        axes = matrix_axes(name, len(shape), logical)
        sides = [math.prod(shape[i] for i in side) for side in (axes.rows, axes.columns)]
        return axes if axes.rows and min(sides) >= min_factored else None

    def start(name: Name, parameter: Any) -> _Moment:
        shape, none = parameter.shape, optax.MaskedNode()
        axes = axes_to_factor(name, shape)
        if axes is None:
            return _Moment(none, none, jnp.zeros(shape, jnp.float32))
        row, column = (
            jnp.zeros([shape[i] for i in axes.batch + side], jnp.float32)
            for side in (axes.rows, axes.columns)
        )
        return _Moment(row, column, none)

    def init(params: Any) -> FactoredState:
        return FactoredState(jnp.zeros([], jnp.int32), *_transposed(map_named(start, params)))

    def update(
        gradients: Any, state: FactoredState, params: Any = None
    ) -> tuple[Any, FactoredState]:
        del params
        count = optax.safe_increment(state.updates)
        new = -jnp.expm1(-exponent * jnp.log(count.astype(jnp.float32)))  # 1 - t ** -exponent

        def mix(old: jax.Array, mean: jax.Array) -> jax.Array:
            return new * old + (1 - new) * mean

        def renew(name: Name, gradient: jax.Array, *old: Any) -> _Moment:
            square = gradient * gradient + eps
            axes = axes_to_factor(name, gradient.shape)
            if axes is None:
                return _Moment(old[0], old[1], mix(old[2], square))
            row = mix(old[0], jnp.mean(square, axes.columns))
            return _Moment(row, mix(old[1], jnp.mean(square, axes.rows)), old[2])

        def divide(name: Name, gradient: jax.Array, *moment: Any) -> jax.Array:
            axes = axes_to_factor(name, gradient.shape)
            if axes is None:
                return gradient * jax.lax.rsqrt(moment[2])
            row = jnp.expand_dims(moment[0], axes.columns)
            # Apart from each other: a quotient of row means can be too small for float32.
            by_row = jax.lax.rsqrt(row) * jnp.sqrt(jnp.mean(row, axes.rows, keepdims=True))
            return gradient * by_row * jax.lax.rsqrt(jnp.expand_dims(moment[1], axes.rows))

        moments = _transposed(map_named(renew, gradients, *state[1:]))
        return map_named(divide, gradients, *moments), FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)


def clip_by_rms(threshold: float, axes: Axes = NO_AXES) -> optax.GradientTransformation:
    """Scales each parameter's direction down to a root mean square of ``threshold`` (§6)."""

    def clip(name: Name, direction: jax.Array) -> jax.Array:
        rms = _root_mean_square(direction, matrix_axes(name, direction.ndim, axes))
        return direction / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, _: map_named(clip, updates))


def scale_by_parameter(least: float, axes: Axes = NO_AXES) -> optax.GradientTransformation:
    """Times the parameter's root mean square, or ``least`` if that is smaller (§8)."""

    def scale(name: Name, direction: jax.Array, parameter: jax.Array) -> jax.Array:
        rms = _root_mean_square(parameter, matrix_axes(name, parameter.ndim, axes))
        return direction * jnp.maximum(least, rms)

    return optax.stateless(lambda updates, params: map_named(scale, updates, params))


def _transposed(moments: Any) -> tuple[Any, Any, Any]:
    """A tree of moments as three trees."""

    def is_moment(node: Any) -> bool:
        return isinstance(node, _Moment)

    row, column, full = (
        jax.tree.map(lambda moment, i=i: moment[i], moments, is_leaf=is_moment) for i in range(3)
    )
    return row, column, full


def _sum_squares(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    return jnp.sum(x * x, axes.own, keepdims=True)


def _root_mean_square(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x, axes.own, keepdims=True))
