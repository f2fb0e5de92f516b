"""RandAugment, 3-Augment and colour jitter, with Pillow.

RandAugment (arXiv:1909.13719) is the variant of DeiT's and timm's recipes ("rand-m9-mstd0.5-inc1"):
fifteen operations, each applied with probability 1/2 and stronger with its magnitude, unlike some
of the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flax_transformers.data.images.decode import from_pillow, pillow, to_pillow

HIGHEST = 10.0  # maximum magnitude
_FILL = 128  # grey value of pixels from outside the image
_DONE = 0.5  # probability that an operation is applied
_BLUR = (0.1, 2.0)  # radius of 3-Augment's blur in pixels, as in DeiT III's code

Operation = Callable[[Any, float, float], Any]
"""(image, strength from 0 to 1, sign) to image."""


def rand_augment(
    pixels: np.ndarray, layers: int, magnitude: float, std: float, rng: np.random.Generator
) -> np.ndarray:
    """Applies ``layers`` operations, drawn with replacement, to uint8 [height, width, C].

    The magnitude of each is normal around ``magnitude``, clipped to 0 and 10.
    """
    image = to_pillow(pixels)
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=layers):
        done = rng.random() < _DONE
        strength = np.clip(rng.normal(magnitude, std), 0.0, HIGHEST) / HIGHEST
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if done:
            image = OPERATIONS[names[number]](image, float(strength), sign)
    return from_pillow(image)


def three_augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of greyscale, solarize and blur with equal probability (arXiv:2204.07118 §3.2)."""
    PIL = pillow()
    image = to_pillow(pixels)
    choice = rng.integers(3)
    if choice == 0:
        return from_pillow(image.convert("L").convert(image.mode))
    if choice == 1:
        return from_pillow(PIL.ImageOps.solarize(image, 128))
    return from_pillow(image.filter(PIL.ImageFilter.GaussianBlur(rng.uniform(*_BLUR))))


def color_jitter(pixels: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """Scales brightness, contrast and saturation by 1 ± ``most``, in random order."""
    enhance = pillow().ImageEnhance
    image = to_pillow(pixels)
    kinds = (enhance.Brightness, enhance.Contrast, enhance.Color)
    factors = rng.uniform(1.0 - most, 1.0 + most, len(kinds))
    for number in rng.permutation(len(kinds)):
        image = kinds[number](image).enhance(float(factors[number]))
    return from_pillow(image)


def _enhance(name: str) -> Operation:
    def enhance(image: Any, strength: float, sign: float) -> Any:
        return getattr(pillow().ImageEnhance, name)(image).enhance(
            max(0.1, 1 + sign * 0.9 * strength)
        )

    return enhance


def _affine(matrix: Callable[[Any, float], tuple[float, ...]]) -> Operation:
    """``matrix(image, signed strength)`` maps positions of the result to those of the image."""

    def transform(image: Any, strength: float, sign: float) -> Any:
        Image = pillow().Image
        fill = _FILL if image.mode == "L" else (_FILL,) * 3
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix(image, sign * strength),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )

    return transform


def _rotate(image: Any, strength: float, sign: float) -> Any:
    fill = _FILL if image.mode == "L" else (_FILL,) * 3
    return image.rotate(sign * 30 * strength, pillow().Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Any, strength: float, sign: float) -> Any:
    added = min(128, int(110 * strength))
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * _bands(image))


def _bands(image: Any) -> int:
    return len(image.getbands())


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, strength, sign: pillow().ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: pillow().ImageOps.equalize(image),
    "invert": lambda image, strength, sign: pillow().ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, strength, sign: pillow().ImageOps.posterize(
        image, max(1, 4 - int(4 * strength))
    ),
    "solarize": lambda image, strength, sign: pillow().ImageOps.solarize(
        image, 256 - min(256, int(256 * strength))
    ),
    "solarize_add": _solarize_add,
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": _affine(lambda image, amount: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": _affine(lambda image, amount: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": _affine(lambda image, amount: (1, 0, 0.45 * amount * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda image, amount: (1, 0, 0, 0, 1, 0.45 * amount * image.height)),
}
