"""BASIC (Pham et al., arXiv:2111.10050): CoAtNet and a text encoder, trained on pairs.

The models were not published; their config and checkpoints exist here only. Shape letters as in
``families/clip.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.families import coatnet
from flax_transformers.families._image_text import ImageTextConfig, ImageTextModel, projection
from flax_transformers.families.clip import FIRST_TEMPERATURE
from flax_transformers.families.coatnet import CoAtNetConfig, CoAtNetModel
from flax_transformers.huggingface.family import Family
from flax_transformers.models.config import VisionConfig
from flax_transformers.models.heads import mean_of_tokens


class BasicModel(ImageTextModel):
    """Both encoders, whose outputs are averaged over positions and mapped to the common space."""

    config: BasicConfig

    image_encoder = CoAtNetModel

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.text_projection = projection(c, c.projection_dim, self.dtype)
        self.image_projection = projection(c.vision, c.projection_dim, self.dtype)

    def pool_image(self, hidden_BTD: jax.Array) -> jax.Array:
        mean_BD = hidden_BTD.mean(axis=1, dtype=jnp.float32).astype(hidden_BTD.dtype)
        return self.image_projection(mean_BD[:, None])[:, 0]

    def pool_text(self, hidden_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        mean_BD = mean_of_tokens(hidden_BTD, self._tokens(input_ids))
        return self.text_projection(mean_BD[:, None])[:, 0]

    def embed_text(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Embeddings float32 [B, E] of length one; padding is neither attended to nor averaged."""
        mask_BT = self._tokens(input_ids) if attention_mask is None else attention_mask
        return super().embed_text(input_ids, mask_BT, position_ids, deterministic=deterministic)

    def _tokens(self, input_ids: jax.Array) -> jax.Array:
        """1 where there is no padding, int32 [B, T]."""
        return (input_ids != self.config.pad_id).astype(jnp.int32)


ARCHITECTURE = "BasicModel"


@dataclass(frozen=True, kw_only=True)
class BasicConfig(ImageTextConfig):
    """The medium size by default: CoAtNet-3, and a text encoder of 12 layers."""

    architecture: str = ARCHITECTURE
    vocab_size: int = 32000
    hidden_size: int = 1024
    num_layers: int = 12
    num_heads: int = 8
    intermediate_size: int = 4096
    max_positions: int | None = 64
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (1,)
    projection_dim: int = 1024
    """Width of the embeddings."""
    vision: VisionConfig = field(default_factory=lambda: _tower("coatnet-3"))
    initial_logit_scale: float = math.log(1 / FIRST_TEMPERATURE)

    RANGES: ClassVar[ranges.Ranges] = {"projection_dim": ranges.WIDTH}


def _tower(size: str) -> CoAtNetConfig:
    """CoAtNet with its norm before the average, as there is no classifier behind it."""
    return replace(coatnet.SIZES[size], hidden_head=False)


SIZES: dict[str, BasicConfig] = {
    "basic-m": BasicConfig(),
    "basic-s": BasicConfig(num_layers=6, num_heads=16, vision=_tower("coatnet-0")),
}
"""The small and the medium size. The image encoder of the large one is CoAtNet-7."""


def from_huggingface(config: Mapping[str, Any]) -> BasicConfig:
    """The default config; there is no config.json of this family to read."""
    del config
    return BasicConfig()


ARCHITECTURES: dict[str, type[nn.Module]] = {ARCHITECTURE: BasicModel}

FAMILY = Family(
    config=BasicConfig,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    only_here=(ARCHITECTURE,),
    from_huggingface=from_huggingface,
)
