"""Decoding of images in all formats and modes, and of damaged ones."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import pytest

from flax_transformers.data.images import decode
from flax_transformers.data.images.decode import UnreadableImage, decode_image, resize

COLORS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_colour_and_grey_are_decoded_exactly_from_lossless_files():
    image = PIL.Image.fromarray(COLORS)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (decode_image(encoded(image, kind), 3) == COLORS).all()
    assert (decode_image(encoded(image, "WEBP", lossless=True), 3) == COLORS).all()
    grey = COLORS[:, :, :1]
    raw = encoded(PIL.Image.fromarray(grey[:, :, 0]))
    assert (decode_image(raw, 1) == grey).all()
    assert (decode_image(raw, 3) == grey.repeat(3, axis=2)).all()


def test_of_sixteen_bits_the_upper_eight_are_taken():
    wide = (COLORS[:, :, 0].astype(np.uint16) << 8) + 77
    for kind in ("PNG", "TIFF"):
        raw = encoded(PIL.Image.fromarray(wide), kind)
        assert (decode_image(raw, 1) == COLORS[:, :, :1]).all()
        assert (decode_image(raw, 3) == COLORS[:, :, :1]).all()


@pytest.mark.parametrize("most", [4095, 65535])
def test_of_grey_ppm_files_of_twelve_and_sixteen_bits_the_upper_eight_are_taken(most):
    values = np.array([[0, most // 2, most]], ">u2")
    raw = b"P5 3 1 %d\n" % most + values.tobytes()
    assert decode_image(raw, 1)[0, :, 0].tolist() == [0, 127, 255]
    assert decode_image(raw, 3)[0, 1].tolist() == [127] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_images_are_composed_over_white(mode):
    image = PIL.Image.new("RGBA", (4, 2), (10, 10, 10, 255))
    image.putpixel((1, 0), (10, 10, 10, 0))
    raw = encoded(image.convert(mode), "TIFF" if mode == "PA" else "PNG")
    pixels = decode_image(raw, 3)
    assert (pixels[0, 1] == 255).all()
    assert (np.delete(pixels.reshape(-1, 3), 1, axis=0) == 10).all()


def test_a_transparent_entry_of_a_palette_is_white_and_the_others_are_looked_up():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decode_image(encoded(image, transparency=0), 3).tolist() == [
        [[255, 255, 255], [40, 50, 60]]
    ]
    assert decode_image(encoded(image, "GIF"), 3).tolist() == [[[1, 2, 3], [40, 50, 60]]]


def test_cmyk_is_converted_to_rgb():
    image = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = decode_image(encoded(image, "JPEG"), 3)
    assert pixels.shape == (8, 8, 3)
    assert (pixels[:, :, 0] > 250).all() and (pixels[:, :, 1:] < 5).all()


def test_the_first_frame_of_an_animation_is_used():
    frames = [PIL.Image.new("L", (3, 3), value) for value in (9, 200)]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(raw, 1) == 9).all()


def test_images_are_rotated_by_their_exif_orientation():
    image, exif = PIL.Image.fromarray(COLORS), PIL.Image.Exif()
    exif[0x0112] = 6
    assert (decode_image(encoded(image, exif=exif), 3) == np.rot90(COLORS, -1)).all()
    raw = encoded(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert (decode_image(raw, 3) == COLORS).all()


def test_unusable_images_have_a_reason():
    whole = encoded(PIL.Image.fromarray(COLORS), "JPEG")
    for raw, why in (
        (b"", "is empty"),
        (b"no image at all", "cannot be decoded"),
        (whole[: len(whole) // 2], "cannot be decoded"),
        (encoded(PIL.Image.fromarray(COLORS[:, :, 0].astype(np.float32)), "TIFF"), "32-bit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    ):
        with pytest.raises(UnreadableImage, match=why):
            decode_image(raw, 3)


def test_a_small_file_that_says_it_is_huge_is_refused_before_it_fills_memory(monkeypatch):
    raw = bytearray(encoded(PIL.Image.fromarray(COLORS), "BMP"))
    raw[18:26] = struct.pack("<ii", 12_000, 10_000)
    with pytest.raises(UnreadableImage, match="has 12000 x 10000 pixels"):
        decode_image(bytes(raw), 3)
    monkeypatch.setattr(decode, "MOST_PIXELS", 34)
    with pytest.raises(UnreadableImage, match="has 7 x 5 pixels"):
        decode_image(encoded(PIL.Image.fromarray(COLORS)), 3)


def test_damaged_files_are_decoded_or_refused_and_nothing_else():
    rng = np.random.default_rng(1)
    image = PIL.Image.fromarray(COLORS)
    whole = [encoded(image, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    refused = 0
    for case in range(600):
        raw = bytearray(whole[case % len(whole)])
        if case % 3 == 0:
            raw = raw[: rng.integers(len(raw))]
        for _ in range(rng.integers(1, 12)):
            if raw:
                raw[rng.integers(len(raw))] = rng.integers(256)
        try:
            pixels = decode_image(bytes(raw), 3)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        except UnreadableImage:
            refused += 1
    assert 100 < refused < 600


def test_resizing_keeps_what_has_the_size_and_takes_the_box_asked_for():
    assert resize(COLORS, (5, 7)) is COLORS
    assert (resize(COLORS, (2, 3), (1, 2, 4, 4)) == COLORS[2:4, 1:4]).all()
    assert resize(COLORS[:, :, :1], (10, 3)).shape == (10, 3, 1)
