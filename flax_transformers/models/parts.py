"""The modules and functions of which a family may have its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from flax_transformers.models.layers.block import TransformerBlock
from flax_transformers.models.layers.embeddings import learned_positions
from flax_transformers.models.layers.positions import default_position_ids, default_rotary
from flax_transformers.models.layers.stack import make_stack


@dataclass(frozen=True)
class ModelParts:
    """What a model is assembled from, besides its config. The defaults are the standard parts.

    All are called with the config first, and a config is all that they depend on:

    - ``block(config, compute, cross_attention=, window=, deterministic=, name=)``: one layer.
    - ``stack(config, compute, block, cross_attention=)``: the stack of layers.
    - ``positions(config, dtype)``: the module of position vectors that are added to embeddings.
    - ``position_ids(config, input_ids, segment_ids)``: position ids where none are given.
    - ``rotary(config, position_ids)``: tables of rotary positions for ``LayerInputs.rotary``.
    - ``relative_bias(config)``: a module without inputs that gives a ``RelativePositionBias`` for
      all layers of an encoder or decoder, or None.
    - ``stem(config, dtype)``: a module from images to vectors of patches; None: a linear map.
    """

    block: Callable[..., nn.Module] = TransformerBlock
    stack: Callable[..., nn.Module] = make_stack
    positions: Callable[..., nn.Module] = learned_positions
    position_ids: Callable[..., Any] = default_position_ids
    rotary: Callable[..., Any] = default_rotary
    relative_bias: Callable[..., nn.Module | None] = lambda config: None
    stem: Callable[..., nn.Module | None] = lambda config, dtype: None
