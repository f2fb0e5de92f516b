"""Base of the objectives over images: their specification, and the normalization of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    ExampleView,
    ModelFunctions,
    Params,
    Rngs,
    WindowSpec,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSpec(WindowSpec):
    """Square images with sides of ``length`` pixels.

    With ``other``, each training image comes with a random second one of the split, to mix with it.
    """

    data: ClassVar[str | None] = "ImageData"

    cross_documents: bool = False


@dataclass(frozen=True, kw_only=True)
class PixelInput:
    """Normalization of 8-bit pixels: scaled to [0, 1], minus the mean, divided by the deviation.

    Pixels are normalized on the device, so that a quarter of the bytes are transferred.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, or one for all."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel, or one for all."""

    RANGES: ClassVar[ranges.Ranges] = {
        "mean": ranges.numbers(-1e6, 1e6),
        "std": ranges.numbers(1e-6, 1e6),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def predictions(self, sequence_length: int) -> int:
        """No logits by position."""
        return 0

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """Nothing: images are shown as pictures."""
        return []

    def normalized(self, pixels_BCHW: Array) -> Array:
        """``pixel_values`` float32 of pixels uint8 [B, C, H, W], of videos [B, F, C, H, W]."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        channels = pixels_BCHW.shape[-3]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"objective.{name} has {len(values)} numbers, but images have {channels} "
                    "channel(s); give one for each, or one for all"
                )
        leading = (1,) * (pixels_BCHW.ndim - 3)
        mean_BCHW, std_BCHW = (
            jnp.asarray(values, jnp.float32).reshape(*leading, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels_BCHW.astype(jnp.float32) / 255.0 - mean_BCHW) / std_BCHW

    def pixels(self, values_BCHW: np.ndarray) -> np.ndarray:
        """Inverse of ``normalized``: [..., C, H, W] to numbers in [0, 1]."""
        mean_CHW, std_CHW = (np.asarray(values)[:, None, None] for values in (self.mean, self.std))
        return np.clip(values_BCHW * std_CHW + mean_CHW, 0.0, 1.0)


def pixels_of(example: Arrays, name: str = "image") -> np.ndarray:
    """An image [H, W, C] of an example, of integers up to 255, as uint8 [C, H, W], or a video
    [F, H, W, C] as [F, C, H, W].

    Raises UserError if the data are not images.
    """
    if name not in example:
        raise UserError("this objective needs images; set data to an ImageData")
    pixels = example[name]
    if pixels.dtype.kind in "iu" and pixels.size and 0 <= pixels.min() <= pixels.max() <= 255:
        pixels = pixels.astype(np.uint8, copy=False)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise UserError(
            f"the pixels of an example are {pixels.dtype} {list(pixels.shape)}; give uint8 from 0 "
            "to 255, [height, width, channels], or [frames, height, width, channels] for videos"
        )
    return np.ascontiguousarray(np.moveaxis(pixels, -1, -3))


def hidden_states(model: ModelFunctions, params: Params, rngs: Rngs, *images: Array) -> Any:
    """Hidden states of images of any size: a phase can have another than the model."""
    return model.head("hidden_states", params, rngs, *images, interpolate_pos_encoding=True)
