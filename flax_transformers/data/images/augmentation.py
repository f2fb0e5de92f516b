"""Cropping of images and, in training, random augmentation.

Images are uint8 [height, width, C]; the generator that is passed is the only source of randomness.
Operations that only move pixels are plain numpy, so that small images need no Pillow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.images.decode import resize
from flax_transformers.data.images.policies import color_jitter, rand_augment, three_augment

_CROP_TRIES = 10  # as in torchvision
_LONGEST = 8  # maximum ratio of the sides, to bound the memory
_ERASE_TRIES = 100  # arXiv:1708.04896 tries without a limit


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random augmentation of training images, in the order of the fields; none by default."""

    crop: Literal["centre", "shift", "resized"] = "centre"
    """``centre``: as in evaluation. ``shift``: the shorter side is resized, the image padded by
    ``padding`` reflected pixels and cropped at random (the simple random crop of arXiv:2204.07118
    §3.2). ``resized``: a random crop is resized (arXiv:1409.4842 §6)."""
    padding: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    """Fraction of the image's area in a ``resized`` crop."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a ``resized`` crop."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    policy: Literal["none", "rand_augment", "three_augment"] = "none"
    """RandAugment (arXiv:1909.13719), or one of greyscale, solarize and blur (3-Augment,
    arXiv:2204.07118 §3.2)."""
    layers: int = 2
    """Number of operations of RandAugment."""
    magnitude: float = 9.0
    """Strength of the operations, from 0 to 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the strength."""
    color_jitter: float = 0.0
    """Maximum relative change of brightness, contrast and saturation."""
    erase: float = 0.0
    """Probability that a rectangle is replaced by random pixels (arXiv:1708.04896)."""
    erase_area: tuple[float, float] = (0.02, 0.4)
    """Its fraction of the image; ``erase_aspect``: its height over width (§3.2 of that paper)."""
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)

    RANGES: ClassVar[ranges.Ranges] = {
        "padding": ranges.integers(0, 2**14),
        "scale": ranges.numbers(0, 1, above=True),
        "aspect": ranges.numbers(1e-6, 1e6),
        "flip": ranges.SHARE,
        "layers": ranges.integers(1, 1000),
        "magnitude": ranges.numbers(0, 10),
        "magnitude_std": ranges.numbers(0, 1000),
        "color_jitter": ranges.SHARE,
        "erase": ranges.SHARE,
        "erase_area": ranges.numbers(0, 1, above=True),
        "erase_aspect": ranges.numbers(1e-6, 1e6),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.augmentation")
        for name in ("scale", "aspect", "erase_area", "erase_aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise ranges.OutOfRange(
                    f"data.augmentation.{name} is {low} to {high}; the first must not be above the "
                    "second"
                )


def augmented(
    pixels: np.ndarray,
    side: int,
    settings: Augmentation,
    crop_fraction: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """A training image uint8 [side, side, C]."""
    if settings.crop == "resized":
        pixels = random_resized_crop(pixels, side, settings.scale, settings.aspect, rng)
    elif settings.crop == "shift":
        pixels = random_shift(pixels, side, settings.padding, rng)
    else:
        pixels = centre_crop(pixels, side, crop_fraction)
    if settings.flip and rng.random() < settings.flip:
        pixels = pixels[:, ::-1]
    if settings.policy == "rand_augment":
        pixels = rand_augment(
            pixels, settings.layers, settings.magnitude, settings.magnitude_std, rng
        )
    elif settings.policy == "three_augment":
        pixels = three_augment(pixels, rng)
    if settings.color_jitter:
        pixels = color_jitter(pixels, settings.color_jitter, rng)
    if settings.erase and rng.random() < settings.erase:
        pixels = erase(pixels, settings.erase_area, settings.erase_aspect, rng)
    return pixels


def centre_crop(pixels: np.ndarray, side: int, fraction: float = 1.0) -> np.ndarray:
    """The centre square of ``fraction`` of the shorter side, resized to uint8 [side, side, C]."""
    height, width = pixels.shape[:2]
    part = min(height, width) * fraction
    left, top = (width - part) / 2, (height - part) / 2
    return resize(pixels, (side, side), (left, top, left + part, top + part))


def random_shift(
    pixels: np.ndarray, side: int, padding: int, rng: np.random.Generator
) -> np.ndarray:
    """See ``Augmentation.crop``."""
    pixels = _resize_shorter(pixels, side)
    pixels = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), "reflect")
    top, left = (int(rng.integers(length - side + 1)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def random_resized_crop(
    pixels: np.ndarray,
    side: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """A crop with a fraction ``scale`` of the area (uniform) and a width over height ``aspect``
    (log-uniform); after ten that do not fit, the largest centre crop.
    """
    height, width = pixels.shape[:2]
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*np.log(aspect)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return resize(pixels, (side, side), (left, top, left + w, top + h))
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return resize(pixels, (side, side), (left, top, left + w, top + h))


def erase(
    pixels: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """A copy with a random rectangle of uniform pixels from 0 to 255 (the paper's RE-R)."""
    height, width, channels = pixels.shape
    for _ in range(_ERASE_TRIES):
        target, ratio = height * width * rng.uniform(*area), rng.uniform(*aspect)
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            pixels = pixels.copy()
            noise = rng.integers(0, 256, (h, w, channels), np.uint8)
            pixels[top : top + h, left : left + w] = noise
            return pixels
    return pixels


def _resize_shorter(pixels: np.ndarray, shorter: int) -> np.ndarray:
    """Resizes the shorter side to ``shorter`` pixels and the other in proportion.

    Extremely long images are centre-cropped first.
    """
    height, width = pixels.shape[:2]
    most = _LONGEST * min(height, width)
    h, w = min(height, most), min(width, most)
    left, top = (width - w) // 2, (height - h) // 2
    size = round(shorter * max(1.0, h / w)), round(shorter * max(1.0, w / h))
    return resize(pixels, size, (left, top, left + w, top + h))
