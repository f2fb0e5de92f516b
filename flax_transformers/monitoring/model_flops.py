"""Matmul FLOPs of one step of a config, by the convention of ``flops``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from flax_transformers.adapters.lora import LoraConfig
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.models.config import (
    EncoderDecoderConfig,
    FlopsGroup,
    TextConfig,
    TransformerConfig,
)
from flax_transformers.models.layers.patches import patch_grid
from flax_transformers.monitoring.mfu import transformer_matmul_flops
from flax_transformers.objectives.base import Objective
from flax_transformers.optim.selection import (
    Axes,
    Name,
    depths,
    kind_of,
    layer_stacks,
    name_of,
    partition,
)


def step_flops(
    model: TransformerConfig,
    objective: Objective,
    params: Any,
    axes: Axes,
    *,
    batch_size: int,
    sequence_length: int,
    frozen: Collection[Name] = (),
) -> float:
    """Matmul FLOPs of one step by the convention of ``flops``.

    ``sequence_length`` is in tokens, or the pixels of an image's side. ``params`` is the tree of
    parameters or their shapes, ``axes`` has their logical axes: kernels with an axis of layers work
    on every token, as does that of the embeddings, and those of experts on the share of tokens that
    are sent to each; other kernels, and for objectives that predict tokens the embedding table
    where it is tied, make logits. Of two stacks, the one with cross-attention is the decoder. The
    config of a model of images says what passes where. ``frozen`` parameters have no gradients.
    """
    own = model.row_flops(sequence_length, getattr(objective, "modalities", ()))
    if own is not None:
        return batch_size * vision_flops(own, params, axes, frozen)
    # Each choice of an example is a sequence of its own.
    tokens = batch_size * sequence_length * getattr(objective, "choices", 1)
    if isinstance(model, TextConfig) and (images := model.image_encoder) is not None:
        image_size: int = getattr(objective, "image_size", images.image_shape[0])
        of_images = batch_size * _image_flops(model, image_size, params, axes, frozen)
        return of_images + _text_encoder_flops(model, tokens, sequence_length, params, axes, frozen)
    predicted = batch_size * objective.predictions(sequence_length)
    predicts_tokens = not {"unembed", "generate"}.isdisjoint(objective.needs.heads)
    sizes = _kernel_sizes(params, axes, model, predicts_tokens, frozen)
    stack = partial(_stack_flops, model)
    if not isinstance(model, EncoderDecoderConfig):
        causal = isinstance(model, TextConfig) and model.causal
        return stack(tokens, sequence_length, sizes, "stack", causal) + 6 * (
            tokens * sizes["embeddings"] + predicted * sizes["head"]
        )
    # The decoder's rows are as long as what is predicted, or as the source for heads of labels,
    # and there may be none. Its look at the encoder is attention without weights of its own here,
    # but for keys and values, which the source's tokens make.
    decoded = (predicted if predicts_tokens else tokens) if sizes["decoder"] else 0
    decoder = partial(_stack_flops, model.decoder)
    return (
        stack(tokens, sequence_length, sizes, "encoder", causal=False)
        + decoder(decoded, decoded // batch_size, sizes, "decoder", causal=True)
        + decoder(decoded, sequence_length, sizes, "decoder", causal=False, weights=False)
        + 6 * (tokens * sizes["context"] + predicted * sizes["head"])
    )


def frozen_names(
    model: TransformerConfig, optimizer: Any, lora: LoraConfig, params: Any
) -> set[Name]:
    """Names of the parameters that are not trained; adapted kernels are."""
    patterns, adapted = getattr(optimizer, "frozen", ()), set()
    if lora.is_on:
        _, adapters = adapted_shapes(build_model(model), lora)
        assert adapters is not None
        patterns, adapted = (*patterns, *adapters.frozen), set(adapters.kernels)
    leaves = jax.tree_util.tree_leaves_with_path(partition(params, patterns)[1])
    return {name_of(path) for path, _ in leaves} - adapted


def vision_flops(
    flops_groups: Sequence[FlopsGroup], params: Any, axes: Axes, frozen: Collection[Name] = ()
) -> float:
    """Matmul FLOPs of one image, forward and backward."""
    flops, shares = 0.0, _shares(params, axes, frozen)
    passes: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = name_of(path)
        if kind_of(name, axes) == "kernel":
            through = next(one for one in flops_groups if "/".join(name).startswith(one.path))
            share = shares.get(name, 1.0)
            flops += 6 * share * leaf.size * through.tokens
            passes[through.path] = max(passes.get(through.path, 0.0), _of_attention(share))
    return flops + sum(
        12 * one.tokens**2 * one.attention * passes.get(one.path, 1.0) for one in flops_groups
    )


def _shares(params: Any, axes: Axes, frozen: Collection[Name]) -> dict[Name, float]:
    """The part of its FLOPs that each frozen weight needs, by the convention of ``monitoring.mfu``:
    two thirds in and above the lowest layer with anything trained, and a third below."""
    if not frozen:
        return {}
    tree = jax.tree_util.tree_leaves_with_path(depths(params, axes)[0])
    depth = {name_of(path): own for path, own in tree}
    lowest = min((own.min() for name, own in depth.items() if name not in frozen), default=np.inf)
    return {
        name: float(np.where(own >= lowest, 2, 1).mean()) / 3
        for name, own in depth.items()
        if name in frozen
    }


def _of_attention(share: float) -> float:
    """The part of its FLOPs that attention needs beside a weight with this share: all or none of
    its backward pass."""
    return 1.0 if share > 1 / 3 else 1 / 3


def _image_flops(
    model: Any, image_size: int, params: Any, axes: Axes, frozen: Collection[Name]
) -> float:
    """Of one image, in a model with a text encoder beside."""
    grid = patch_grid((image_size,) * 2, model.vision.patch_size)
    of_images = {name: tree for name, tree in params.items() if name.startswith("image_")}
    return vision_flops(model.flops_groups(grid), of_images, axes, frozen)


def _text_encoder_flops(
    model: TextConfig,
    tokens: int,
    sequence_length: int,
    params: Any,
    axes: Axes,
    frozen: Collection[Name],
) -> float:
    """Of all texts, beside an image encoder; the head reads one vector of each text."""
    of_texts = {name: tree for name, tree in params.items() if name.startswith("text_")}
    sizes = _kernel_sizes(of_texts, axes, model, predicts_tokens=False, frozen=frozen)
    head = 6 * tokens // sequence_length * sizes["head"]
    return head + _stack_flops(model, tokens, sequence_length, sizes, "stack", model.causal)


def _stack_flops(
    model: TransformerConfig,
    tokens: int,
    key_length: int,
    sizes: Mapping[str, float],
    part: str,
    causal: bool,
    weights: bool = True,
) -> float:
    """Of attention, and with ``weights`` of the kernels of a ``part`` of ``_kernel_sizes``."""
    seen = [_keys_seen(key_length, window, causal) for window in model.windows]
    return transformer_matmul_flops(
        tokens=tokens,
        matmul_parameters=sizes.get(part, 0) * model.layer_uses * weights,
        num_layers=1,
        attention_width=model.attention_width * sizes.get(f"{part} attention", 1.0),
        key_length=sum(seen) / len(seen),
        causal=causal,
    )


def _keys_seen(length: int, window: int | None, causal: bool) -> float:
    """Keys of a row that a query looks at in one layer, on average; twice that if ``causal``, of
    which the convention counts half."""
    if window is None or window >= length:
        return length
    if causal:
        return 2 * window - window**2 / length
    return min(length, 2 * window + 1 - window * (window + 1) / length)


def _kernel_sizes(
    params: Any,
    axes: Axes,
    model: TransformerConfig,
    predicts_tokens: bool,
    frozen: Collection[Name],
) -> dict[str, float]:
    """How many weights of matmuls a token passes through in each part.

    "stack", or "encoder" and "decoder" of an encoder-decoder; "context" are the keys and values
    that the decoder makes of the encoder's output, half of its keys and values; "embeddings" leads
    from embeddings to the layers; "head" makes logits, with the tied table if those are of tokens.
    Of all experts a token passes through those that it is sent to. Frozen weights count in part,
    as does attention of a part without gradients: "stack attention" is its share.
    """
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    stacks = layer_stacks({name: leaf.shape for name, leaf in leaves.items()}, axes)
    decoder = model.decoder if isinstance(model, EncoderDecoderConfig) else None
    of_decoder = list(stacks.values())[-1].rows if decoder is not None and len(stacks) > 1 else {}
    rows = getattr(decoder or model, "padded_vocab_size", 0)
    sizes: defaultdict[str, float] = defaultdict(float)
    shares, table = _shares(params, axes, frozen), 0.0
    for name, leaf in leaves.items():
        named, kind, size = axes.get(name, ()), kind_of(name, axes), leaf.size
        if "expert" in named:
            experts = getattr(model, "experts", 1)
            size = size * getattr(model, "experts_per_token", experts) // experts
        share = shares.get(name, 1.0)
        if kind == "kernel" and "layers" in named:
            part = "stack" if decoder is None else "decoder" if name in of_decoder else "encoder"
            if part == "decoder" and "key_heads" in named:
                sizes["context"] += size // 2 * share
                size -= size // 2
            sizes[part] += size * share
            attention = f"{part} attention"
            sizes[attention] = max(sizes[attention], _of_attention(share))
        elif kind == "kernel":
            sizes["embeddings" if name[0] == "embeddings" else "head"] += size * share
        elif kind == "embedding" and named[0] == "vocab" and leaf.shape[0] == rows:
            # Of two tables of one size, one makes logits, above all layers.
            table = size * (2 / 3 if name in shares else 1.0)
    if predicts_tokens and isinstance(model, TextConfig) and model.tie_embeddings:
        sizes["head"] += table
    return sizes
