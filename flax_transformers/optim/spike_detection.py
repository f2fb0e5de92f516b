"""Spikes: steps whose gradients are many times as large as they have been, which can undo a run.

The step itself is left out before it does any harm, and the run goes on with the next batch. Where
that does not help, for many steps in a row, the run may go back to its newest checkpoint and past
the data since, as PaLM went back a hundred steps and left out the batches around a spike
(arXiv:2204.02311 §5.1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError

WINDOW = 100
"""Updates that the mean remembers. Before there were so many, nothing is called a spike."""


class TooManySkipped(UserError):
    """More steps in a row were skipped than ``max_consecutive_skips``."""


def is_spike(norm: jax.Array, mean: jax.Array, updates: jax.Array, above: float) -> jax.Array:
    """Whether a gradient's ``norm`` is more than ``above`` times the ``mean`` of the ``updates``
    made before; all are scalars on the device."""
    return (updates >= WINDOW) & (norm > above * mean)


def renewed_mean(norm: jax.Array, mean: jax.Array, updates: jax.Array) -> jax.Array:
    """The mean with one more ``norm``: of all the first ``WINDOW``, then an exponential one."""
    return mean + (norm - mean) / jnp.minimum(updates + 1, WINDOW).astype(jnp.float32)
