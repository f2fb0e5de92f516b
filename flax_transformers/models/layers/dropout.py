"""Dropout as a layer."""

from __future__ import annotations

import flax.linen as nn
import jax

from flax_transformers.models.config import DropoutGenerator
from flax_transformers.models.kernels.dropout import dropout


class Dropout(nn.Module):
    """Zero elements with probability ``rate`` and scale up the others, unless ``deterministic``."""

    rate: float
    generator: DropoutGenerator = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """The shape and dtype of ``x``; the key is the stream "dropout"."""
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"), self.generator)
