"""Layer norm (arXiv:1607.06450) and RMS norm (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp


def make_norm(
    kind: Literal["layer", "rms"], eps: float, dtype: jnp.dtype, name: str | None = None
) -> nn.Module:
    """A norm over the last axis with parameters ``scale`` and, for layer norm, ``bias``.

    Statistics are float32 and the variance is the mean of squared deviations: the cheaper
    ``E[x^2] - E[x]^2`` loses digits that parity with the originals needs.
    """
    scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
    if kind == "rms":
        return nn.RMSNorm(epsilon=eps, dtype=dtype, scale_init=scale_init, name=name)
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=scale_init,
        bias_init=bias_init,
        name=name,
    )
