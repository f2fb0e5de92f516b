"""Matmul FLOPs of one step of a config, by the convention of ``flops``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from flax_transformers.models.config import (
    EncoderDecoderConfig,
    FlopsGroup,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.models.layers.patches import patch_grid
from flax_transformers.monitoring.mfu import transformer_matmul_flops
from flax_transformers.objectives.base import Objective


def step_flops(
    model: TransformerConfig,
    objective: Objective,
    params: Any,
    *,
    batch_size: int,
    sequence_length: int,
) -> float:
    """Matmul FLOPs of one step by the convention of ``flops``.

    ``sequence_length`` is in tokens, or the pixels of an image's side. ``params`` is the tree of
    (abstract) parameters: kernels below a stack, which alone have a leading axis of layers, work
    on every token, those of experts on the share of tokens that are sent to each; other kernels,
    and the word table where it is tied, make logits. A model of images says itself what passes
    where.
    """
    if isinstance(model, VisionConfig):
        grid = patch_grid((sequence_length,) * 2, model.patch_size)
        return batch_size * vision_flops(model.flops_groups(grid), params)
    tokens = batch_size * sequence_length
    predicted = batch_size * objective.predictions(sequence_length)
    sizes = _kernel_sizes(params, model)
    stack = partial(_stack_flops, model)
    if not isinstance(model, EncoderDecoderConfig):
        causal = isinstance(model, TextConfig) and model.causal
        return stack(tokens, sequence_length, sizes["stack"], causal) + 6 * (
            predicted * sizes["head"]
        )
    # The decoder's rows are as long as what is predicted. Its look at the encoder is attention
    # without weights of its own here, but for keys and values, which the source's tokens make.
    decoder = partial(_stack_flops, model.decoder)
    return (
        stack(tokens, sequence_length, sizes["encoder"], causal=False)
        + decoder(predicted, predicted // batch_size, sizes["decoder"], causal=True)
        + decoder(predicted, sequence_length, 0, causal=False)
        + 6 * (tokens * sizes["context"] + predicted * sizes["head"])
    )


def vision_flops(flops_groups: Sequence[FlopsGroup], params: Any) -> float:
    """Matmul FLOPs of one image, forward and backward."""
    flops = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        if name.endswith("/kernel"):
            through = next(one for one in flops_groups if name.startswith(one.path))
            flops += 6 * leaf.size * through.tokens
    return flops + sum(12 * one.tokens**2 * one.attention for one in flops_groups)


def _stack_flops(
    model: TransformerConfig, tokens: int, key_length: int, parameters: int, causal: bool
) -> float:
    seen = [_keys_seen(key_length, window, causal) for window in model.windows]
    return transformer_matmul_flops(
        tokens=tokens,
        matmul_parameters=parameters,
        num_layers=model.num_layers,
        attention_width=model.num_heads * model.head_width,
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


def _weights_used(names: Sequence[str], leaf: Any, model: TransformerConfig) -> int:
    """Weights of a kernel that a token passes through: of all experts, those it is sent to."""
    experts = getattr(model, "experts", 1)
    if "mlp" in names and names[-2] in ("up", "gate", "down"):
        return leaf.size * getattr(model, "experts_per_token", experts) // experts
    return leaf.size


def _kernel_sizes(params: Any, model: TransformerConfig) -> Counter[str]:
    """How many weights of matmuls there are in each part.

    "stack", or "encoder" and "decoder" of an encoder-decoder; "context" are the keys and values
    that the decoder makes of what the encoder gives; "head" makes logits.
    """
    sizes: Counter[str] = Counter()
    table = None
    if isinstance(model, TextConfig) and model.tie_embeddings:
        table = "words" if getattr(model, "share_embeddings", True) else "decoder_words"
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] == "kernel" and any(name.startswith("block_") for name in names):
            part = names[0] if names[0] in ("encoder", "decoder") else "stack"
            looked_at = "cross_attention" in names and names[-2] in ("key", "value")
            sizes["context" if looked_at else part] += _weights_used(names, leaf, model)
        elif names[-1] == "kernel" or names == [table, "embedding"]:
            sizes["head"] += leaf.size
    return sizes
