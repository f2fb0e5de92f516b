"""Spikes: steps whose gradient norm is many times its recent mean, which can make a run diverge.

Such a step is skipped. After many consecutive skips the run may roll back to its newest checkpoint
and leave out the data since, as PaLM did (arXiv:2204.02311 §5.1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_transformers.errors import UserError

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
