"""Decodes image files to pixels, by one policy.

* Formats: JPEG, PNG, WebP, GIF (first frame), BMP, TIFF and PPM.
* Every mode is converted to 8-bit RGB, or 8-bit greyscale for one channel: palettes, CMYK and YCbCr
  are converted, of 16 bits the upper 8 are used. Transparent images are composed over white.
* The orientation in EXIF data is applied; damaged EXIF data is ignored.
* Errors: empty, truncated or damaged files, more than `MOST_PIXELS` pixels, and 32-bit pixels,
  whose range is unknown.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from flax_transformers.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 100_000_000
"""A small file can declare an image that exceeds the memory."""


class UnreadableImage(Exception):
    """An image cannot be used; the message gives the reason."""


def pillow() -> Any:
    """The module ``PIL``. Raises UserError if it is not installed."""
    try:
        import PIL.ExifTags
        import PIL.Image
        import PIL.ImageEnhance
        import PIL.ImageFilter
        import PIL.ImageOps
    except ImportError as error:
        raise UserError(
            "images are decoded and resized with Pillow, which is not installed; install the extra "
            "'vision'"
        ) from error
    return PIL


def decode_image(raw: bytes, channels: int) -> np.ndarray:
    """The pixels uint8 [height, width, channels] of an image file; ``channels`` is 1 or 3.

    Raises UnreadableImage by the policy above.
    """
    PIL = pillow()
    if not raw:
        raise UnreadableImage("is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # replaced by the policy above
        try:
            with PIL.Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UnreadableImage(f"has {image.width} x {image.height} pixels")
                image.load()
                return _pixels(image, "L" if channels == 1 else "RGB")
        except (UnreadableImage, UserError):
            raise
        except PIL.UnidentifiedImageError as error:  # its message contains a memory address
            raise UnreadableImage("cannot be decoded (no known format)") from error
        except Exception as error:  # damaged files raise any error in Pillow's readers
            raise UnreadableImage(f"cannot be decoded ({error})") from error


def _pixels(image: Any, mode: str) -> np.ndarray:
    PIL = pillow()
    if image.mode == "I" and image.format == "PPM":  # 9 to 16 bits, which Pillow scales to 16
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImage("has 32-bit pixels, whose range is unknown")
    image = _upright(image)
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(image.height, image.width, -1)


def _upright(image: Any) -> Any:
    try:
        return pillow().ImageOps.exif_transpose(image)
    except Exception:
        return image


def resize(
    pixels: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Bicubic resize with antialiasing of uint8 [height, width, C] to ``size`` (height, width).

    ``box``: the part to resize (left, top, right, bottom), default all of it. An image that has the
    size already is returned unchanged.
    """
    height, width = pixels.shape[:2]
    whole = (0, 0, width, height)
    if (height, width) == size and box in (None, whole):
        return pixels
    image = to_pillow(pixels).resize(size[::-1], pillow().Image.Resampling.BICUBIC, box)
    return from_pillow(image)


def to_pillow(pixels: np.ndarray) -> Any:
    """A Pillow image of uint8 [height, width, 1 or 3]."""
    return pillow().Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def from_pillow(image: Any) -> np.ndarray:
    """The inverse of ``to_pillow``."""
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)
