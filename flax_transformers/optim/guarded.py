"""An update that is made or left out by a condition on the device.

XLA computes both branches of ``jnp.where``: the plain form holds the old and the new state at once,
and copies one of them. The form in place writes each array over the old one, for which it needs an
order of computation that XLA would not choose by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_transformers.parallel.partitioning import is_divided

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
