"""Masked autoencoding of images (MAE, arXiv:2111.06377)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.images import ImageSpec, PixelInput, hidden_states, pixels_of


@dataclass(frozen=True, kw_only=True)
class MaskedImage(PixelInput):
    """Mean squared error of the pixels of masked patches (section 3, "Reconstruction target").

    The number of masked patches and their normalization are settings of the model (``mask_ratio``,
    ``norm_pix_loss``). Each example has a key for its mask.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("reconstruct", "targets"), ("pixel_values", "noise"))

    def window_spec(self, sequence_length: int) -> ImageSpec:
        return ImageSpec(sequence_length)

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``pixel_values`` uint8 [C, side, side]; ``mask_key`` uint32 [2] of the random mask;
        ``weights`` float32 [], 1."""
        return {
            "pixel_values": pixels_of(example),
            "mask_key": rng.integers(0, 1 << 32, 2, np.uint32),
            "weights": np.array(1.0, np.float32),
        }

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "reconstruction", a mean over masked patches; the metric "loss"."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        reconstruction = self.reconstruct(model, params, batch, rngs)
        error_BT = jnp.mean((reconstruction.predicted_BTK - reconstruction.target_BTK) ** 2, axis=2)
        counted_BT = reconstruction.masked_BT * batch["weights"][:, None]
        loss, count = jnp.sum(error_BT * counted_BT), jnp.sum(counted_BT)
        return LossTerms(
            losses={"reconstruction": (loss, count, 1.0)}, metrics={"loss": (loss, count)}
        )

    def reconstruct(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs
    ) -> Reconstruction:
        """Predict the masked patches of a batch."""
        pixel_values = self.normalized(batch["pixel_values"])
        target_BTK = model.head("targets", params, {}, pixel_values)
        noise_BT = mask_noise(batch["mask_key"], target_BTK.shape[1])
        states = hidden_states(model, params, rngs, pixel_values, noise_BT)
        predicted_BTK = model.head("reconstruct", params, rngs, states)
        return Reconstruction(target_BTK, predicted_BTK, states.mask)


@dataclass(frozen=True)
class Reconstruction:
    """Patches float32 [B, T, K], and ``masked_BT`` float32, 1 at masked patches."""

    target_BTK: Any
    predicted_BTK: Any
    masked_BT: Any


def mask_noise(keys: Array, patches: int) -> Array:
    """Uniform random numbers float32 [B, patches] from keys uint32 [B, 2], one for each example.

    They do not depend on other examples of the batch, nor on its sharding.
    """
    import jax

    def one(key: Array) -> Array:
        return jax.random.uniform(jax.random.wrap_key_data(key, impl="threefry2x32"), (patches,))

    return jax.vmap(one)(keys)
