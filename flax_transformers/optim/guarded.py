"""An update that is made or left out by a condition on the device: all values are finite, and the
gradient is no spike.

XLA computes both branches of ``jnp.where``: the plain form holds the old and the new state at once,
and copies one of them. The form in place writes each array over the old one, for which it needs an
order of computation that XLA would not choose by itself.

A spike is a gradient norm of many times its recent mean, which can make a run diverge. After many
consecutive skips the run may roll back to its newest checkpoint and leave out the data since, as
PaLM did (arXiv:2204.02311 §5.1).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError
from flax_transformers.parallel.partitioning import is_divided


def is_finite(params: Any, opt_state: Any, average: Any = None) -> jax.Array:
    """Whether all floating-point values of these trees are finite, as one boolean on the device.

    A scalar of the optimizer may be infinite, as a running minimum is at its start, but not NaN.
    ``average`` is that of the parameters, or None.

    A parameter is tested together with its statistics, and by "and" rather than by a count: so the
    new values of all of them are computed and tested in one pass over memory, and none is written.
    """
    shapes = jax.tree.map(jnp.shape, params)

    def is_alike(tree: Any) -> bool:
        """Whether a tree has a leaf for each parameter, of its shape; a lone array has not."""
        return isinstance(tree, Mapping) and jax.tree.map(jnp.shape, tree) == shapes

    def parts(tree: Any) -> tuple[list[list[jax.Array]], list[jax.Array]]:
        """The leaves of each tree inside that is alike, and those of the rest."""
        found = jax.tree.leaves(tree, is_leaf=is_alike)
        alike = [jax.tree.leaves(part) for part in found if is_alike(part)]
        return alike, [part for part in found if not is_alike(part)]

    parameters, statistics = parts((params, average)), parts(opt_state)
    found = [_all_finite(*leaves) for leaves in zip(*parameters[0], *statistics[0], strict=True)]
    found += [_all_finite(leaf) for leaf in parameters[1]]
    found += [_all_finite(leaf) if leaf.ndim else ~jnp.isnan(leaf) for leaf in statistics[1]]
    return functools.reduce(operator.and_, found, jnp.array(True))


def _all_finite(*leaves: jax.Array) -> jax.Array:
    """Whether arrays of one shape are finite; those of integers are."""
    return jnp.all(functools.reduce(operator.and_, map(jnp.isfinite, leaves)))


Updated = tuple[Any, Any, Any]
"""Parameters, state of the optimizer, and average of the parameters or None."""

Update = Callable[[Any, Any], tuple[Updated, jax.Array]]
"""``(state, grads)`` to the updated arrays, and whether they are finite (bool scalar)."""


def guarded_update(
    update: Update, state: Any, grads: Any, usable: jax.Array, *, in_place: bool
) -> tuple[Updated, jax.Array]:
    """The arrays of ``update(state, grads)`` if ``usable`` (bool scalar) and they are finite, else
    those of ``state``; and whether they are finite.

    ``state`` has ``params``, ``opt_state`` and ``ema``. ``in_place``: compute the update twice,
    first to test it; on the CPU that is faster than a second state, and results differ by rounding.
    """
    updated, is_finite = update(state, grads)
    usable &= is_finite
    if in_place:
        return _in_turn(update, state, grads, usable), is_finite
    return choose(usable, updated, (state.params, state.opt_state, state.ema)), is_finite


def choose(usable: jax.Array, new: Any, old: Any) -> Any:
    """The tree ``new`` if ``usable``, a bool scalar on the device, else ``old``."""
    return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)


def _in_turn(update: Update, state: Any, grads: Any, usable: jax.Array) -> Updated:
    """The update onto the old state if it is ``usable``: average, then parameters, then statistics.

    The average is computed from the old parameters too, and these from the old statistics: in this
    order nothing has to be copied first. The barrier keeps the compiler from holding what it
    computed for the test.
    """
    state, grads, usable = jax.lax.optimization_barrier((state, grads, usable))
    (params, opt_state, average), _ = update(state, grads)
    average = choose(usable, average, state.ema)
    params = choose(_after(average, usable), params, state.params)
    return params, choose(_after(params, usable), opt_state, state.opt_state), average


def _after(written: Any, usable: jax.Array) -> jax.Array:
    """``usable``, in a form that the compiler can only compute after the arrays of ``written``."""
    leaves = [] if is_divided() else jax.tree.leaves(written)  # elements are at hand on one device
    for element in (leaf.ravel()[0] for leaf in leaves if leaf.size):
        usable &= ~((element == element) & (element != element))
    return usable


WINDOW = 100
"""Updates that the mean covers. Earlier there are no spikes."""


class TooManySkipped(UserError):
    """More steps in a row were skipped than ``max_consecutive_skips``."""


def is_spike(norm: jax.Array, mean: jax.Array, updates: jax.Array, above: float) -> jax.Array:
    """Whether a gradient's ``norm`` is more than ``above`` times the ``mean`` of the ``updates``
    made before; all are scalars on the device. A mean of 0 is none: see ``renewed_mean``."""
    return (updates >= WINDOW) & (mean > 0) & (norm > above * mean)


def renewed_mean(norm: jax.Array, mean: jax.Array, updates: jax.Array) -> jax.Array:
    """The mean with one more ``norm``: of all the first ``WINDOW``, then an exponential one.

    A checkpoint from before means were kept has the mean 0, which the next norm replaces.
    """
    count = jnp.minimum(updates + 1, WINDOW).astype(jnp.float32)
    return jnp.where(mean > 0, mean + (norm - mean) / count, norm)
