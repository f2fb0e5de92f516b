"""Whether all values of a state are finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def is_finite(params: Any, opt_state: Any, average: Any = None) -> jax.Array:
    """Whether all floating-point values of these trees are finite, as one boolean on the device.

    A scalar of the optimizer may be infinite, as a running minimum is at its start, but not NaN.
    ``average`` is that of the parameters, or None. Each array is reduced to a count, and the counts
    are added, which costs one reduction of a scalar on a mesh.
    """
    counts = [jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in _floats(params)]
    counts += [jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in _floats(average)]
    for leaf in _floats(opt_state):
        wrong = ~jnp.isfinite(leaf) if leaf.ndim else jnp.isnan(leaf)
        counts.append(jnp.sum(wrong, dtype=jnp.float32))
    return sum(counts, start=jnp.zeros(())) == 0


def _floats(tree: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
