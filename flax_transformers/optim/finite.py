"""Whether all values of a state are finite."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


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
