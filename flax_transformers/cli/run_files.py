"""Files for transformers that are derived from a run: image preprocessing, and length limits."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax_transformers.checkpointing.step_directories import Found
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model, within_vocabulary
from flax_transformers.models.config import (
    ImageTextConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.objectives.images import PixelInput
from flax_transformers.restore import saved_part

log = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
_BICUBIC = 3
"""Pillow's index of the bicubic filter, with which this package resizes images."""


def run_files(
    run: Found, model: TransformerConfig, tokenizer: Path | None
) -> dict[str, dict[str, Any]]:
    """JSON files by name, to be exported with the weights of a checkpoint.

    ``tokenizer`` is the folder of its tokenizer. Of the run's config only ``data`` and
    ``objective`` of a vision model are read; if that fails, a warning is logged.
    """
    if isinstance(model, VisionConfig):
        return _image_files(run, model)
    if isinstance(model, ImageTextConfig):
        return _image_files(run, model.vision) | _text_files(model, tokenizer)
    return _text_files(model, tokenizer)


def _image_files(run: Found, model: VisionConfig) -> dict[str, dict[str, Any]]:
    try:
        data, objective = saved_part(run, "data"), saved_part(run, "objective")
    except UserError as error:
        log.warning("%s is not written: %s", PREPROCESSOR, error)
        return {}
    if isinstance(data, ImageData) and isinstance(objective, PixelInput):
        return {PREPROCESSOR: preprocessor(data, objective, model)}
    return {}


def _text_files(model: TransformerConfig, tokenizer: Path | None) -> dict[str, dict[str, Any]]:
    file = None if tokenizer is None else tokenizer / TOKENIZER
    limit = model.max_positions if isinstance(model, TextConfig) else None
    if file is None or limit is None or not file.is_file():
        return {}
    return {TOKENIZER: {"model_max_length": limit, **json.loads(file.read_text("utf-8"))}}


def preprocessor(data: ImageData, pixels: PixelInput, model: VisionConfig) -> dict[str, Any]:
    """A preprocessor_config.json with the preprocessing of evaluation: a centre crop of
    ``data.crop_fraction`` of the shorter side, resized, scaled to [0, 1] and normalised."""
    height, width = model.image_shape
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": model.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / data.crop_fraction)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _of_each(pixels.mean, model.num_channels),
        "image_std": _of_each(pixels.std, model.num_channels),
    }


def _of_each(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)


def with_ids_of(model: Any, tokenizer: Path | None) -> Any:
    """The model with start and end ids of its tokenizer, if its config has none that are valid."""
    config: Any = within_vocabulary(model.config)
    if tokenizer is None or not tokenizer.is_dir() or config == model.config:
        return model
    vocabulary = load_tokenizer(tokenizer).vocabulary
    changes: dict[str, Any] = {}
    if config.bos_id is None and config.bos_id != model.config.bos_id:
        changes["bos_id"] = vocabulary.bos_id
    if not config.eos_ids and vocabulary.end_id is not None:
        changes["eos_ids"] = (vocabulary.end_id,)
    return build_model(replace(config, **changes), model.compute)
