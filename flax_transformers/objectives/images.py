"""What objectives over images share: what they ask of the data, and pixels as a model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Array, ModelFunctions, Params, WindowSpec
from flax_transformers.ranges import Ranges

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSpec(WindowSpec):
    """Which images an objective asks for: squares of ``length`` pixels a side.

    ``other``: with each training image comes a second one, any of the split, to mix with it.
    """

    cross_documents: bool = False


@dataclass(frozen=True, kw_only=True)
class PixelInput:
    """How 8-bit pixels become a model's input: scaled to [0, 1], minus the mean, over the spread.

    Pixels stay 8 bits wide until they are on the device, a quarter of the way to carry.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, or one for all."""
    std: tuple[float, ...] = IMAGENET_STD

    RANGES: ClassVar[Ranges] = {
        "mean": ranges.numbers(-1e6, 1e6),
        "std": ranges.numbers(1e-6, 1e6),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def predictions(self, sequence_length: int) -> int:
        """No places of a row get logits of their own."""
        return 0

    def normalized(self, pixels_BCHW: Array) -> Array:
        """Pixels uint8 [B, C, H, W] as ``pixel_values`` float32."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        channels = pixels_BCHW.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"objective.{name} has {len(values)} numbers, but images have {channels} "
                    "channel(s); give one for each, or one for all"
                )
        mean_CHW, std_CHW = (
            jnp.asarray(values, jnp.float32)[:, None, None] for values in (self.mean, self.std)
        )
        return (pixels_BCHW.astype(jnp.float32) / 255.0 - mean_CHW[None]) / std_CHW[None]

    def pixels(self, values_BCHW: np.ndarray) -> np.ndarray:
        """The inverse of ``normalized``, for pictures: [..., C, H, W] to numbers in [0, 1]."""
        mean_CHW, std_CHW = (np.asarray(values)[:, None, None] for values in (self.mean, self.std))
        return np.clip(values_BCHW * std_CHW + mean_CHW, 0.0, 1.0)


def pixels_of(example: dict[str, np.ndarray], name: str = "image") -> np.ndarray:
    """An image uint8 [height, width, C] of an example as [C, height, width].

    Raises UserError where the data are no images.
    """
    if name not in example:
        raise UserError("this objective learns from images; set data to an ImageData")
    return np.ascontiguousarray(example[name].transpose(2, 0, 1))


def hidden_states(
    model: ModelFunctions, params: Params, rngs: Mapping[str, Array], *images: Array
) -> Any:
    """The model's, for images of any size: a phase may show others than the model was made for."""
    return model.head("hidden_states", params, rngs, *images, interpolate_pos_encoding=True)
