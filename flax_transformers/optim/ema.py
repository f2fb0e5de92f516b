"""A running average of the parameters, which is what evaluation and restored models use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights. Off, it costs nothing."""

    decay: float | None = None
    """Share of the old average that an update keeps, such as 0.9999; None: no average is kept."""
    warmup: bool = True
    """Keep ``min(decay, (1 + t) / (10 + t))`` after t updates, so that the first weights fade."""

    RANGES: ClassVar[Ranges] = {"decay": ranges.RATE}

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
