"""Whether all values of a state are finite."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp


def is_finite(params: Any, opt_state: Any, average: Any = None) -> jax.Array:
    """Whether all floating-point values of these trees are finite, as one boolean on the device.

    A scalar of the optimizer may be infinite, as a running minimum is at its start, but not NaN.
    ``average`` is that of the parameters, or None. Each array is reduced by "and" rather than to a
    count: XLA's CPU backend then computes an update and tests it in one pass, without writing it.
    """
    found = [jnp.all(jnp.isfinite(leaf)) for leaf in _floats((params, average))]
    for leaf in _floats(opt_state):
        found.append(jnp.all(jnp.isfinite(leaf)) if leaf.ndim else ~jnp.isnan(leaf))
    return functools.reduce(operator.and_, found, jnp.array(True))


def _floats(tree: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
