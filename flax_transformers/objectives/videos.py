"""Objectives over videos: masked autoencoding and classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flax_transformers.objectives.base import (
    Arrays,
    Batch,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import hidden_states
from flax_transformers.objectives.masked_image import MaskedImage, Reconstruction, mask_noise
from flax_transformers.objectives.signals import SignalSpec, array_of, label_of
from flax_transformers.ranges import OutOfRange

VIDEO = "video"
"""Name of the source: videos uint8 [F, H, W, C]."""


@dataclass(frozen=True, kw_only=True)
class MaskedVideo(MaskedImage):
    """``MaskedImage`` of videos with tube masks (VideoMAE, arXiv:2203.12602 section 3.2).

    Targets are pixels in [0, 1], normalized as the model says.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(
        ("reconstruct", "targets", "tube_mask"), ("pixel_values", "bool_masked_pos")
    )

    def window_spec(self, sequence_length: int) -> SignalSpec:  # type: ignore[override]
        return SignalSpec(sequence_length, names=(VIDEO,))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """As of ``MaskedImage``, with ``pixel_values`` uint8 [F, C, H, W]."""
        return super().prepare({"image": array_of(example, VIDEO)}, rng, vocab, sequence_length)

    def reconstruct(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs
    ) -> Reconstruction:
        """Predict the masked tubelets, and only these: [B, M, K]."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        pixels = batch["pixel_values"]
        target_BTK = model.head("targets", params, {}, pixels.astype(jnp.float32) / 255.0)
        noise_BT = mask_noise(batch["mask_key"], target_BTK.shape[1])
        mask_BT = model.head("tube_mask", params, {}, noise_BT)
        states = hidden_states(model, params, rngs, self.normalized(pixels), mask_BT)
        predicted_BMK = model.head("reconstruct", params, rngs, states)
        target_BMK = jnp.take_along_axis(target_BTK, states.masked[:, :, None], axis=1)
        return Reconstruction(target_BMK, predicted_BMK, jnp.ones(states.masked.shape, jnp.float32))


@dataclass(frozen=True, kw_only=True)
class VideoClassification(ImageClassification):
    """``ImageClassification`` of videos; they are not mixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup or self.cutmix:
            raise OutOfRange("objective.mixup and objective.cutmix must be 0: videos are not mixed")

    def window_spec(self, sequence_length: int) -> SignalSpec:  # type: ignore[override]
        return SignalSpec(sequence_length, names=(VIDEO,))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """As of ``ImageClassification``, with ``pixel_values`` uint8 [F, C, H, W]."""
        video = {"image": array_of(example, VIDEO), "label": label_of(example)}
        return super().prepare(video, rng, vocab, sequence_length)
