"""Cross-entropy over a vocabulary that may be sharded, as sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood in nats and whether the label has the highest logit.

    ``logits`` float32 [..., V], ``labels`` integer [...]; both results are float32 [...]. The
    label's logit is picked by comparison and not by a gather: over a sharded vocabulary a
    comparison stays on each device, where a gather would collect all logits first.
    """
    vocabulary = jnp.arange(logits.shape[-1])
    chosen = jnp.expand_dims(labels, -1) == jnp.expand_dims(vocabulary, tuple(range(labels.ndim)))
    label_logit = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    highest = jnp.max(logits, axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - label_logit
    return nll, (label_logit >= highest).astype(jnp.float32)
