"""Attention probabilities of a model, and those of an example that a report shows.

Shape letters as in `models`; R and C are the rows and columns of a grid of patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Objective
from flax_transformers.reporting.attention_charts import AttentionMaps

K = TypeVar("K")

MAX_TOKENS, IMAGES = 20, 3
"""Tokens of the one text whose attention is shown, and images."""
LEAST_TOKENS = 6
"""Tokens of a text that is chosen to be shown, if there is one."""
MAX_LAYERS, MAX_HEADS = 12, 16
"""Layers that are shown, evenly spread, and heads, the first ones."""

_PART = re.compile(r"(first|layers|remainder)(?:_([0-9]+))?")
_BLOCK = re.compile(r"block_([0-9]+)")
_PARTS = ("first", "layers", "remainder")


def attention_probabilities(model: nn.Module, params: Any, **inputs: Any) -> dict[str, np.ndarray]:
    """Which positions each head attends to, of any family.

    ``inputs`` are those of a call of the model, arrays and options. Returns float32 [L, B, N, T,
    S], of T queries and S keys, by the name of the stack of layers in the model: "attention" of one
    stack, "encoder/attention", "decoder/attention" and "decoder/cross_attention" of two. Layers
    that are called repeatedly come once for each call. Layers of a stack that differ in shape have
    entries of their own, such as "stage_2/first/attention".

    The probability of a masked key is zero for every query that is not padding.
    Raises UserError for a model that has no attention.
    """
    arrays = {name: value for name, value in inputs.items() if not _is_option(value)}
    options = tuple((name, value) for name, value in inputs.items() if name not in arrays)
    try:
        hash((model, options))
    except TypeError:  # a module with a field that has no hash, such as an array
        run: Callable[..., Any] = jax.jit(partial(_sown, model, options))
    else:
        run = partial(_compiled_sown, model, options)
    layers = _layers(jax.device_get(run(params, arrays)))
    if not layers:
        raise UserError(f"{type(model).__name__} has no attention that can be shown")
    return _stacks(layers)


def _is_option(value: Any) -> bool:
    """Whether an input has no arrays, such as a bool."""
    return not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))


def _sown(
    model: Any, options: tuple[tuple[str, Any], ...], params: Any, arrays: dict[str, Any]
) -> Any:
    """What the layers of a model store in a call, a tree of tuples with an array for each call."""
    call = partial(model.apply, **dict(options), mutable=["intermediates"])
    return call({"params": params}, **arrays)[1].get("intermediates", {})


_compiled_sown = jax.jit(_sown, static_argnums=(0, 1))  # which compiles equal calls once


@dataclass(frozen=True)
class _Layer:
    """Probabilities float32 [R, B, N, T, S] of one call of a layer, of its R repetitions.

    ``before`` and ``after`` are the names on its path before and after those of the part of the
    stack; ``number`` sorts parts, their repetitions and the blocks of the pattern.
    """

    before: tuple[str, ...]
    part: tuple[str, ...]
    after: tuple[str, ...]
    call: int
    number: tuple[int, int, int]
    values: np.ndarray

    def names(self) -> tuple[str, str, str]:
        """The name of the stack, with that of the part, and with the number of the call too."""
        each = (*self.before, *self.part, *self.after)
        return "/".join(self.before + self.after), "/".join(each), "/".join([*each, f"{self.call}"])


def _name(detail: int, layer: _Layer) -> str:
    return layer.names()[detail]


def _layers(sown: Mapping[str, Any]) -> list[_Layer]:
    found = []
    for path, calls in flatten_dict(sown).items():
        if path[-1] == "probabilities":
            before, part, after, number = _split(path[:-1])
            for call, values in enumerate(calls):
                # Layers that share parameters have an axis more.
                values = values.reshape(-1, *values.shape[-4:])
                found.append(_Layer(before, part, after, call, number, values))
    return found


def _split(
    path: tuple[str, ...],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[int, int, int]]:
    """``before``, ``part``, ``after`` and ``number`` of a `_Layer`. A path may have no part of a
    `Stack`, or one of `separate_layers`, where each repetition has a part of its own."""
    for i, pair in enumerate(pairwise(path)):
        part, block = _PART.fullmatch(pair[0]), _BLOCK.fullmatch(pair[1])
        if part and block:
            before = path[: path.index("stack")] if "stack" in path[:i] else path[:i]
            number = _PARTS.index(part[1]), int(part[2] or 0), int(block[1])
            return before, (part[1],), path[i + 2 :], number
    return (), (), path, (0, 0, 0)


def _stacks(layers: Sequence[_Layer]) -> dict[str, np.ndarray]:
    """Layers by the shortest names of `_Layer.names` under which they have equal shapes."""
    stacks: dict[str, np.ndarray] = {}
    for group in _grouped(layers, partial(_name, 0)).values():
        for detail in range(3):
            named = _grouped(group, partial(_name, detail))
            if all(len({one.values.shape[1:] for one in same}) == 1 for same in named.values()):
                break
        stacks |= {name: _in_order(same) for name, same in named.items()}
    return stacks


def _in_order(layers: Sequence[_Layer]) -> np.ndarray:
    """Layers [L, ...]: calls and parts in turn, and in each the blocks of every repetition."""
    parts = _grouped(layers, lambda layer: (layer.call, *layer.number[:2]))
    found = []
    for key in sorted(parts):
        blocks = [one.values for one in sorted(parts[key], key=lambda one: one.number)]
        found.append(np.stack(blocks, axis=1).reshape(-1, *blocks[0].shape[1:]))
    return np.concatenate(found)


def _grouped(layers: Sequence[_Layer], key: Callable[[_Layer], K]) -> dict[K, list[_Layer]]:
    found: dict[K, list[_Layer]] = {}
    for layer in layers:
        found.setdefault(key(layer), []).append(layer)
    return found


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
    if "noise" in model.inputs:
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
            grid = _grid(config, name, values.shape[-1])
            if grid is None:
                keys = tokens.get("input_ids", ())
                written = tokens.get("decoder_input_ids", keys)
                queries = written if name.startswith("decoder") else keys
                keys = keys if name.endswith("cross_attention") else queries
                found.append(AttentionMaps(name, values, tuple(layers), queries, keys))
            elif not name.startswith("reconstruction_head"):  # which has nothing to fill in here
                picture = np.moveaxis(batch["pixel_values"][example], 0, -1) / 255.0
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
        positions = np.flatnonzero(texts[chosen])[:MAX_TOKENS]
        for name in _of_tokens(model, batch, side):
            found[name] = batch[name].reshape(texts.shape)[chosen : chosen + 1, positions]
    pixels, normalized = batch.get("pixel_values"), getattr(objective, "normalized", None)
    if pixels is not None and pixels.ndim == 4 and normalized is not None:
        found["pixel_values"] = np.asarray(normalized(pixels[:IMAGES]))
        if "noise" in model.inputs:
            rows, columns = model.config.grid
            noise_T = np.arange(rows * columns, dtype=np.float32)
            found["noise"] = np.tile(noise_T, (len(found["pixel_values"]), 1))
    return found


def _of_tokens(model: nn.Module, batch: Mapping[str, np.ndarray], side: str) -> list[str]:
    """Names of the arrays with an element for each token that ``model`` reads, but for masks of
    padding and of segments: there is one segment, without padding."""
    shape = batch[f"{side}input_ids"].shape
    left_out = (f"{side}attention_mask", f"{side}segment_ids")
    return [
        name
        for name in model.inputs
        if name in batch
        and batch[name].shape == shape
        and name.startswith("decoder_") == bool(side)
        and name not in left_out
    ]


def _first_texts(batch: Mapping[str, np.ndarray], side: str) -> np.ndarray:
    """bool [texts, T]: tokens of the first segment of each text, without padding."""
    ids = batch[f"{side}input_ids"]
    mask = batch.get(f"{side}segment_ids", batch.get(f"{side}attention_mask", np.ones_like(ids)))
    return mask.reshape(-1, ids.shape[-1]) == 1


def _grid(config: Any, name: str, keys: int) -> tuple[int, int] | None:
    """Rows and columns of the patches among the ``keys`` of a stack; None for text."""
    encoder = config.image_encoder
    if encoder is None or not (encoder is config or name.startswith("image_")):
        return None
    rows, columns = encoder.grid
    # In a pyramid this is the grid of the last stage; those before it are finer.
    finer = max(1, math.isqrt((keys - len(encoder.tokens)) // (rows * columns)))
    return rows * finer, columns * finer


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
