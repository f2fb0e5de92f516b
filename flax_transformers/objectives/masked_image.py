"""Masked autoencoding of images (MAE, arXiv:2111.06377): paint the patches that are hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flax_transformers.objectives.base import (
    Array,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.images import ImageSpec, PixelInput, hidden_states, pixels_of


@dataclass(frozen=True, kw_only=True)
class MaskedImage(PixelInput):
    """Mean squared error of the hidden patches' pixels (§3, "Reconstruction target").

    How many patches are hidden, and whether each patch is normalised, are settings of the model
    (``mask_ratio``, ``norm_pix_loss``); which ones follows from a key of each row.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("reconstruct", "targets"), ("pixel_values", "noise"))

    def window_spec(self, sequence_length: int) -> ImageSpec:
        return ImageSpec(sequence_length)

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` uint8 [C, side, side]; ``mask_key`` uint32 [2], from which the mask is
        drawn; ``weights`` float32 [], 1 for a real row."""
        return {
            "pixel_values": pixels_of(example),
            "mask_key": rng.integers(0, 1 << 32, 2, np.uint32),
            "weights": np.array(1.0, np.float32),
        }

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "reconstruction", a mean over hidden patches."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        painted = self.paint(model, params, batch, rngs)
        error_BT = jnp.mean((painted.predicted_BTK - painted.target_BTK) ** 2, axis=2)
        counted_BT = painted.hidden_BT * batch["weights"][:, None]
        loss, count = jnp.sum(error_BT * counted_BT), jnp.sum(counted_BT)
        return LossTerms(
            losses={"reconstruction": (loss, count, 1.0)}, metrics={"loss": (loss, count)}
        )

    def paint(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Painted:
        """What the model makes of the rows of a batch."""
        pixel_values = self.normalized(batch["pixel_values"])
        target_BTK = model.head("targets", params, {}, pixel_values)
        noise_BT = mask_noise(batch["mask_key"], target_BTK.shape[1])
        states = hidden_states(model, params, rngs, pixel_values, noise_BT)
        predicted_BTK = model.head("reconstruct", params, rngs, states)
        return Painted(target_BTK, predicted_BTK, states.mask)

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        """Nothing to read; the pictures are what there is to see."""
        return []


@dataclass(frozen=True)
class Painted:
    """Patches float32 [B, T, K]: as they are to be, and as they were painted.

    ``hidden_BT`` float32: 1 at patches that the encoder did not see.
    """

    target_BTK: Any
    predicted_BTK: Any
    hidden_BT: Any


def mask_noise(keys: Array, patches: int) -> Array:
    """Numbers in [0, 1), float32 [B, patches], from the keys uint32 [B, 2] of rows.

    A row's numbers depend on its key alone, whatever rows and devices there are beside it.
    """
    import jax

    def one(key: Array) -> Array:
        return jax.random.uniform(jax.random.wrap_key_data(key, impl="threefry2x32"), (patches,))

    return jax.vmap(one)(keys)
