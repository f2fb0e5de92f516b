"""The vector of a text or an image: what the layers make of it, without a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.models.config import VisionConfig
from flax_transformers.models.heads import text_vectors
from flax_transformers.models.vision import VisionModel
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    Frame,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.images import ImageSpec, PixelInput, hidden_states, pixels_of
from flax_transformers.objectives.rows import padded_tokens

Pool = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class ImageEmbedding(PixelInput):
    """The ``predict`` of a vector for each image: the mean of its patches, or the class token."""

    needs: ClassVar[ModelNeeds] = ModelNeeds((), ("pixel_values",))

    pool: Pool
    tokens: int
    """Number of tokens before the patches."""

    def window_spec(self, sequence_length: int) -> ImageSpec:
        return ImageSpec(sequence_length)

    def prepare(
        self, example: Arrays, rng: np.random.Generator, vocab: Vocabulary, sequence_length: int
    ) -> Arrays:
        """``pixel_values`` uint8 [C, side, side] and ``labels`` int32 []."""
        label = np.asarray(example["label"], np.int32)
        return {"pixel_values": pixels_of(example), "labels": label}

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``embedding`` float32 [B, D] and ``labels`` int32 [B].

        ``model``: the functions of `encoder_of`."""
        import jax.numpy as jnp

        pixel_values = self.normalized(batch["pixel_values"])
        hidden_BTD = hidden_states(model, params, {}, pixel_values).last_hidden_state
        hidden_BTD = hidden_BTD.astype(jnp.float32)
        mean = self.pool == "mean"
        vector_BD = hidden_BTD[:, self.tokens :].mean(axis=1) if mean else hidden_BTD[:, 0]
        return {"embedding": vector_BD, "labels": batch["labels"]}


@dataclass(frozen=True)
class TextEmbedding:
    """The ``predict`` of a vector for each text: the mean of its tokens, or the first one."""

    needs: ClassVar[ModelNeeds] = ModelNeeds((), ("input_ids",))

    frame: Frame
    pool: Pool
    normalize: bool = False
    encodes: bool = False
    """Whether the model is an encoder-decoder, whose encoder is used."""

    def prepare(
        self, example: Arrays, rng: np.random.Generator, vocab: Vocabulary, sequence_length: int
    ) -> Arrays:
        """The frame around ``tokens``, which are cut to fit: arrays int32 [T]."""
        before, after = self.frame.before, self.frame.after
        kept = example["tokens"][: sequence_length - len(before) - len(after)]
        ids = np.concatenate([before, kept, after]).astype(np.int32)
        return padded_tokens(ids, sequence_length, vocab)

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``embedding`` float32 [B, D]."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.encodes:
            hidden_BTD = model.head("encode", params, {}, ids, mask)
        else:
            hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        return {"embedding": text_vectors(hidden_BTD, mask, self.pool, self.normalize)}


def encoder_of(model: Any) -> VisionModel:
    """A model whose ``hidden_states`` are those of all patches, by the given model's parameters.

    Raises UserError for another kind of model than those of one image.
    """
    if not isinstance(model, VisionModel):
        raise UserError(
            f"a {type(model).__name__} has no vector of an image; give a model of the ViT's kind"
        )
    if "noise" not in model.inputs:
        return model
    # A masked autoencoder, which hides patches: its layers alone are those of a ViT.
    return VisionModel(config=model.config, compute=model.compute, parts=model.parts)


def image_embedding(config: VisionConfig, pixels: PixelInput, pool: Pool | None) -> ImageEmbedding:
    """The embedding with the normalization of an objective.

    ``pool`` None: what the model's classifier gets, or the mean where that is learned. Raises
    UserError for the class token of a model without one.
    """
    pool = pool or config.feature_pool
    if pool == "cls" and not config.tokens:
        raise UserError("the model has no class token, which --pool cls gives; use --pool mean")
    return ImageEmbedding(mean=pixels.mean, std=pixels.std, pool=pool, tokens=len(config.tokens))
