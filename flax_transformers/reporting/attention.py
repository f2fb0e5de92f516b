"""Attention probabilities of a model, and those of an example that a report shows.

Shape letters as in `models`; R and C are the rows and columns of a grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.families.mae import MaeConfig
from flax_transformers.models.config import ImageTextConfig, VisionConfig
from flax_transformers.objectives.base import Objective
from flax_transformers.reporting.attention_charts import AttentionMaps

MAX_TOKENS, IMAGES = 20, 3
"""Tokens of the one text whose attention is shown, and images."""
LEAST_TOKENS = 6
"""Tokens of a text that is chosen to be shown, if there is one."""
MAX_LAYERS, MAX_HEADS = 12, 16
"""Layers that are shown, evenly spread, and heads, the first ones."""

_PARTS = ("first", "layers", "remainder")


def attention_probabilities(model: nn.Module, params: Any, **inputs: Any) -> dict[str, np.ndarray]:
    """Which positions each head attends to, of any family.

    ``inputs`` are those of a call of the model. Returns float32 [L, B, N, T, S], of T queries and S
    keys, by the place of the layers in the model: "attention" of one stack, "encoder/attention",
    "decoder/attention" and "decoder/cross_attention" of two. A masked key has probability zero.
    Raises UserError for a model that has no attention.
    """

    @jax.jit
    def run(params: Any, inputs: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, **inputs, mutable=["intermediates"])[1]

    sown = jax.device_get(run(params, inputs)).get("intermediates", {})
    stacks: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for path, (values,) in flatten_dict(sown).items():
        if path[-1] == "probabilities":
            name, place = _place(path[:-1])
            # Layers that share parameters have an axis more.
            stacks.setdefault(name, {})[place] = values.reshape(-1, *values.shape[-4:])
    if not stacks:
        raise UserError(f"{type(model).__name__} has no attention that can be shown")
    return {name: _in_order(found) for name, found in stacks.items()}


def _place(path: tuple[str, ...]) -> tuple[str, tuple[int, int]]:
    """The name of a stack, and which of its parts and of the blocks of its pattern ``path`` is."""
    part = next((i for i, name in enumerate(path) if name in _PARTS), None)
    if part is None:
        return "/".join(path), (0, 0)
    before = path[: path.index("stack")] if "stack" in path[:part] else path[:part]
    block = int(path[part + 1].removeprefix("block_"))
    return "/".join([*before, *path[part + 2 :]]), (_PARTS.index(path[part]), block)


def _in_order(found: Mapping[tuple[int, int], np.ndarray]) -> np.ndarray:
    """Layers [L, ...] of a stack: its parts in turn, and in each the blocks of every repetition."""
    parts = []
    for number in sorted({part for part, _ in found}):
        blocks = [found[key] for key in sorted(found) if key[0] == number]
        parts.append(np.stack(blocks, axis=1).reshape(-1, *blocks[0].shape[1:]))
    return np.concatenate(parts)


def attention_maps(
    model: nn.Module,
    params: Any,
    objective: Objective,
    batch: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None,
    target_tokenizer: Tokenizer | None = None,
) -> list[AttentionMaps]:
    """The attention of a model on examples of a ``batch``, as the ``objective`` prepares them.

    Of texts it is the first segment of one of them, up to ``MAX_TOKENS`` tokens; of images the
    first ones. A masked autoencoder sees all patches. Raises UserError for models of anything but
    texts and images.
    """
    config: Any = model.config
    if isinstance(config, MaeConfig):
        model = model.clone(config=replace(config, mask_ratio=0.0))
    inputs = _inputs(model, objective, batch)
    if not inputs:
        raise UserError("attention is shown of texts and images, and this model reads others")
    tokens = {
        name: tuple(reader.pieces(inputs[name][0]))
        for name, reader in (
            ("input_ids", tokenizer),
            ("decoder_input_ids", target_tokenizer or tokenizer),
        )
        if name in inputs and reader is not None
    }
    found = []
    stacks = attention_probabilities(model, params, **inputs)
    for name in sorted(stacks, key=lambda name: (name.startswith("decoder"), name)):
        values_LBNTS = stacks[name]
        layers = _spread(len(values_LBNTS), MAX_LAYERS)
        for example, values in enumerate(values_LBNTS[layers, :, :MAX_HEADS].swapaxes(0, 1)):
            if not _is_of_image(config, name):
                keys = tokens.get("input_ids", ())
                written = tokens.get("decoder_input_ids", keys)
                queries = written if name.startswith("decoder") else keys
                keys = keys if name.endswith("cross_attention") else queries
                found.append(AttentionMaps(name, values, tuple(layers), queries, keys))
            elif not name.startswith("reconstruction_head"):  # which has nothing to fill in here
                picture = np.moveaxis(batch["pixel_values"][example], 0, -1) / 255.0
                grid = _grid(values.shape[-1], picture.shape[:2])
                values = _over_patches(values, grid)
                found.append(AttentionMaps(name, values, tuple(layers), picture=picture))
    return found


def _inputs(
    model: nn.Module, objective: Objective, batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One text and ``IMAGES`` images for ``model``; empty if it reads neither."""
    found: dict[str, np.ndarray] = {}
    chosen: int | None = None
    for side in ("", "decoder_"):
        ids = batch.get(f"{side}input_ids")
        if ids is None or f"{side}input_ids" not in model.inputs:
            continue
        texts = _first_texts(batch, side)
        if chosen is None:
            counts = [np.count_nonzero(text) for text in texts]
            chosen = next((i for i, n in enumerate(counts) if n >= LEAST_TOKENS), 0)
        places = np.flatnonzero(texts[chosen])[:MAX_TOKENS]
        for name in (f"{side}input_ids", *(() if side else ("token_type_ids",))):
            if name in batch and name in model.inputs:
                found[name] = batch[name].reshape(texts.shape)[chosen : chosen + 1, places]
    pixels, normalized = batch.get("pixel_values"), getattr(objective, "normalized", None)
    if pixels is not None and pixels.ndim == 4 and normalized is not None:
        found["pixel_values"] = np.asarray(normalized(pixels[:IMAGES]))
        if "noise" in model.inputs:
            rows, columns = model.config.grid
            noise_T = np.arange(rows * columns, dtype=np.float32)
            found["noise"] = np.tile(noise_T, (len(found["pixel_values"]), 1))
    return found


def _first_texts(batch: Mapping[str, np.ndarray], side: str) -> np.ndarray:
    """bool [texts, T]: tokens of the first segment of each text, without padding."""
    ids = batch[f"{side}input_ids"]
    mask = batch.get(f"{side}segment_ids", batch.get(f"{side}attention_mask", np.ones_like(ids)))
    return mask.reshape(-1, ids.shape[-1]) == 1


def _is_of_image(config: Any, name: str) -> bool:
    of_pair = isinstance(config, ImageTextConfig) and name.startswith("image_")
    return of_pair or isinstance(config, VisionConfig)


def _grid(keys: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most ``keys`` square patches over an image."""
    grids = (
        (max(1, round(columns * size[0] / size[1])), columns) for columns in range(keys, 0, -1)
    )
    return next(grid for grid in grids if grid[0] * grid[1] <= keys)


def _over_patches(values_LNTS: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[L, N, R, C]: keys of the first query where tokens precede the patches, else the mean."""
    patches = grid[0] * grid[1]
    values_LNS = values_LNTS[:, :, 0]
    if values_LNTS.shape[-1] == patches:
        values_LNS = values_LNTS.mean(axis=2)
    return values_LNS[..., -patches:].reshape(*values_LNS.shape[:2], *grid)


def _spread(total: int, count: int) -> list[int]:
    """At most ``count`` numbers below ``total``, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, count))})
