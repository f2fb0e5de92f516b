"""Models of two encoders, of images and of texts, for families that are trained on pairs.

Shape letters as in ``models``; E is the width of embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.models.config import (
    ComputeConfig,
    FlopsGroup,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.models.layers.linear import Linear, feature_map
from flax_transformers.models.outputs import HiddenStates, ModelOutput
from flax_transformers.models.text import TextModel
from flax_transformers.models.vision import VisionModel


@dataclass(frozen=True, kw_only=True)
class ImageTextConfig(TextConfig):
    """A text encoder, which the fields of ``TextConfig`` describe, and an image encoder."""

    vision: VisionConfig
    """The image encoder."""
    initial_logit_scale: float
    """Initial logarithm of the factor on the cosine of two embeddings."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Ids at the start and the end of a text."""

    RANGES: ClassVar[ranges.Ranges] = {
        "initial_logit_scale": ranges.numbers(-20, 20),
        "bos_id": ranges.TOKEN_ID,
        "eos_ids": ranges.TOKEN_ID,
    }

    @property
    def image_encoder(self) -> VisionConfig | None:
        return self.vision

    @property
    def ends_in_embedding(self) -> bool:
        return self.causal

    def flops_groups(self, grid: tuple[int, int]) -> tuple[FlopsGroup, ...]:
        """As of ``VisionConfig``, for the parameters of this model that images pass through."""
        *layers, head = self.vision.flops_groups(grid)
        return (*(replace(one, path=f"image_tower/{one.path}") for one in layers), head)


class ImageTextOutput(ModelOutput):
    """``image_embeds`` and ``text_embeds`` float32 [B, E], of length one. ``logits_per_image``
    float32 [images, texts] are their scaled cosines, and ``logits_per_text`` the transpose."""

    logits_per_image: jax.Array | None = None
    logits_per_text: jax.Array | None = None
    image_embeds: jax.Array | None = None
    text_embeds: jax.Array | None = None


class Scalar(nn.Module):
    """A number that is learned: the parameter ``kind``, "scale" or "bias", which is not decayed."""

    kind: str
    start: float
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.constant(self.start)
        init = nn.with_logical_partitioning(init, (None,) * len(self.shape))
        return self.param(self.kind, init, self.shape, jnp.float32).reshape(())


class ImageTextModel(nn.Module):
    """Base of models with an image and a text encoder.

    Subclasses make their heads in ``setup``, and define ``pool_image`` and ``pool_text``. A cosine
    times ``exp(logit_scale)`` plus ``logit_bias``, if there is one, is a logit.
    """

    config: ImageTextConfig
    compute: ComputeConfig = ComputeConfig()

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids", "pixel_values", "attention_mask", "position_ids",
    )  # fmt: skip
    output: ClassVar[type[ModelOutput]] = ImageTextOutput
    image_encoder: ClassVar[type[VisionModel]] = VisionModel
    initial_logit_bias: ClassVar[float | None] = None
    """None for models without a bias of the logits."""

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest input that initialises every parameter."""
        c = self.config.vision
        pixels = jnp.zeros((1, c.num_channels, *c.image_shape), jnp.float32)
        return {"input_ids": jnp.zeros((1, 2), jnp.int32), "pixel_values": pixels}

    def setup(self) -> None:
        c = self.config
        self.text_tower = TextModel(c, self.compute)
        self.image_tower = self.image_encoder(c.vision, self.compute)
        # Published models with a bias have two vectors of length one, the others a scalar.
        shape = () if self.initial_logit_bias is None else (1,)
        self.logit_scale = Scalar("scale", c.initial_logit_scale, shape)
        if self.initial_logit_bias is not None:
            self.logit_bias = Scalar("bias", self.initial_logit_bias, shape)

    def pool_image(self, hidden_BTD: jax.Array) -> jax.Array:
        """Embeddings [B, E] of hidden states of images."""
        raise NotImplementedError

    def pool_text(self, hidden_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Embeddings [B, E] of hidden states of texts, and their ids [B, T]."""
        raise NotImplementedError

    def embed_image(self, pixel_values: jax.Array, **options: Any) -> jax.Array:
        """Embeddings float32 [B, E] of length one; ``options`` as for ``VisionModel``."""
        states = self.image_tower.hidden_states(pixel_values, **options)
        return _unit(self.pool_image(states.last_hidden_state))

    def embed_text(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Embeddings float32 [B, E] of length one; inputs as for ``TextModel``."""
        states = self.text_tower.hidden_states(
            input_ids, attention_mask, position_ids=position_ids, deterministic=deterministic
        )
        return _unit(self.pool_text(states.last_hidden_state, input_ids))

    def scale_and_bias(self, *, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """Logarithm of the factor on cosines, and the bias of logits: float32 scalars."""
        bias = jnp.zeros(()) if self.initial_logit_bias is None else self.logit_bias()
        return self.logit_scale(), bias

    def hidden_states(
        self,
        input_ids: jax.Array,
        pixel_values: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> HiddenStates:
        """Hidden states of the texts, and as ``encoder_last_hidden_state`` those of the images."""
        text = self.text_tower.hidden_states(
            input_ids, attention_mask, position_ids=position_ids, deterministic=deterministic
        )
        image = self.image_tower.hidden_states(pixel_values, deterministic=deterministic)
        return HiddenStates(text.last_hidden_state, image.last_hidden_state)

    def __call__(
        self,
        input_ids: jax.Array,
        pixel_values: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
    ) -> ImageTextOutput:
        """Embeddings and logits of all pairs of images and texts."""
        image_BE = self.embed_image(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
        )
        text_BE = self.embed_text(
            input_ids, attention_mask, position_ids, deterministic=deterministic
        )
        scale, bias = self.scale_and_bias()
        cosine_BB = jnp.einsum("IE,JE->IJ", image_BE, text_BE, precision="highest")
        logits_BB = jnp.exp(scale) * cosine_BB + bias
        return ImageTextOutput(
            logits_per_image=logits_BB,
            logits_per_text=logits_BB.T,
            image_embeds=image_BE,
            text_embeds=text_BE,
        )


def _unit(vector_BE: jax.Array) -> jax.Array:
    """Vectors of length one, float32."""
    vector_BE = vector_BE.astype(jnp.float32)
    square_B1 = jnp.sum(jnp.square(vector_BE), axis=-1, keepdims=True)
    return vector_BE * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-24))


def projection(config: TransformerConfig, width: int, dtype: jnp.dtype) -> Linear:
    """The map [B, T, D] to [B, T, E] of an encoder's output, without a bias."""
    size = config.hidden_size
    return feature_map(size, width, dtype, use_bias=False, init_std=size**-0.5)
