"""The image size in copied preprocessor files, which is that of the model that is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_transformers.huggingface.tensor_files import read_json
from flax_transformers.models.config import TransformerConfig

_IMAGES, _PROCESSOR = "preprocessor_config.json", "processor_config.json"


def resized_files(carried: Mapping[str, Path], config: TransformerConfig) -> dict[str, Any]:
    """Those of the ``carried`` files, by name, that give images of another size than the model's,
    with its size."""
    found: dict[str, Any] = {}
    if config.image_encoder is None:
        return found
    shape = config.image_encoder.image_shape
    for name in carried.keys() & {_IMAGES, _PROCESSOR}:
        described = read_json(carried[name])
        if name == _IMAGES:
            changed = _resized(described, shape)
        else:
            images = described.get("image_processor")
            changed = described
            if isinstance(images, dict):
                changed = {**described, "image_processor": _resized(images, shape)}
        if changed != described:
            found[name] = changed
    return found


def _resized(described: Mapping[str, Any], shape: tuple[int, int]) -> Mapping[str, Any]:
    """An image processor's config for images of ``shape``, which keeps the fraction that a centre
    crop has of the resized image."""
    size, cut = described.get("size"), described.get("crop_size")
    if not described.get("do_center_crop", cut is not None) or cut is None:
        kept = _sides(size) in (None, shape)
        return described if kept else {**described, "size": _like(size, shape)}
    sides = _sides(cut)
    if sides is None or sides == shape:
        return described
    changed = {**described, "crop_size": _like(cut, shape)}
    if (whole := _sides(size)) is not None:
        changed["size"] = _like(size, _scaled(whole, (shape[0] / sides[0], shape[1] / sides[1])))
    elif isinstance(size, Mapping) and isinstance(size.get("shortest_edge"), int):
        (shorter,) = _scaled([size["shortest_edge"]], [min(shape) / min(sides)])
        changed["size"] = {**size, "shortest_edge": shorter}
    return changed


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width, if a size gives both."""
    given = size if isinstance(size, Mapping) else {"height": size, "width": size}
    height, width = given.get("height"), given.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None


def _like(size: Any, shape: Iterable[int]) -> Any:
    """Height and width in the form of ``size``."""
    height, width = shape
    if isinstance(size, int) and height == width:
        return height
    return {"height": height, "width": width}


def _scaled(sides: Iterable[int], factors: Iterable[float]) -> list[int]:
    return [round(side * factor) for side, factor in zip(sides, factors, strict=True)]
