"""From the bytes of an image file to pixels, by one policy for whatever is found in the wild.

* JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF and PPM are read, and nothing else.
* Every mode becomes 8-bit RGB, or 8-bit grey for one channel: palettes are looked up, CMYK and
  YCbCr converted, of 16 bits the upper 8 taken. What is transparent is laid over white.
* The orientation that a camera notes in EXIF is applied; EXIF data that is damaged says nothing.
* Refused are files that are empty, cut short or damaged, more pixels than `MOST_PIXELS`, and pixels
  whose range is not known (32-bit numbers).
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from flax_transformers.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 100_000_000
"""A small file can describe an image that fills all memory."""


class UnreadableImage(Exception):
    """An image that cannot be used; the message says why."""


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
        warnings.simplefilter("ignore")  # what Pillow warns of is decided here
        try:
            with PIL.Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UnreadableImage(f"has {image.width} x {image.height} pixels")
                image.load()
                return _pixels(image, "L" if channels == 1 else "RGB")
        except (UnreadableImage, UserError):
            raise
        except PIL.UnidentifiedImageError as error:  # names an address in memory
            raise UnreadableImage("cannot be decoded (no known format)") from error
        except Exception as error:  # damaged files raise whatever comes up in Pillow's readers
            raise UnreadableImage(f"cannot be decoded ({error})") from error


def _pixels(image: Any, mode: str) -> np.ndarray:
    PIL = pillow()
    if image.mode in ("I", "F"):
        raise UnreadableImage("has pixels of 32 bits, whose range is not known")
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
    """Bicubic, antialiased: uint8 [height, width, C] to ``size`` (height, width).

    ``box`` (left, top, right, bottom) is the part that is taken, by default all of it. What has
    the size already comes back as it is.
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
