"""An exponential moving average of the parameters, for evaluation and restored models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_transformers import ranges


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights; off by default."""

    decay: float | None = None
    """Share of the old average in the new one, such as 0.9999; None: no average is kept."""
    warmup: bool = True
    """Use ``min(decay, (1 + t) / (10 + t))`` after t updates, which forgets the first weights."""

    RANGES: ClassVar[ranges.Ranges] = {"decay": ranges.RATE}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "ema")

    @property
    def is_on(self) -> bool:
        return self.decay is not None


def renew_average(config: EMAConfig, average: Any, params: Any, updates: jax.Array) -> Any:
    """The average with ``params`` in it, ``updates`` (int32) being the updates before this one."""
    assert config.decay is not None
    t = updates.astype(jnp.float32)
    # The share of the new weights: as 1 - decay it would be a difference of float32 numbers.
    share = jnp.float32(1 - config.decay)
    if config.warmup:
        share = jnp.maximum(share, 9 / (10 + t))
    return jax.tree.map(lambda old, new: old + share * (new - old), average, params)
