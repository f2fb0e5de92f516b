"""The standard layer: attention, then feed-forward, each with a norm and a residual sum."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.kernels.kv_cache import KeyValues, LayerCache
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.attention import Attention
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.feed_forward import FeedForward
from flax_transformers.models.layers.norms import make_norm
from flax_transformers.parallel.partitioning import HIDDEN, constrain


class LayerInputs(struct.PyTreeNode):
    """Inputs that all layers of a stack share, besides the hidden states.

    ``mask`` and ``context_mask``: masks of self-attention and cross-attention. ``rotary``: tables
    of the rotary positions. ``bias``: added to the scores of self-attention. ``context_BSD``: the
    sequence that cross-attention attends to; None once its keys and values are cached. ``index``:
    slot of the first new key in the cache, an int32 scalar; with it, layers return a cache.
    """

    mask: AttentionMask | None = None
    rotary: Any = None
    bias: RelativePositionBias | None = None
    context_BSD: jax.Array | None = None
    context_mask: AttentionMask | None = None
    index: jax.Array | None = None


class LayerOutput(struct.PyTreeNode):
    """What a layer returns besides hidden states: the updated cache, and sums for auxiliary losses
    (of a mixture of experts). The same fields are None in every layer of a stack."""

    cache: LayerCache | None = None
    auxiliary: Any = None


class TransformerBlock(nn.Module):
    """One layer, pre-norm ``x + f(norm(x))`` or post-norm ``norm(x + f(x))``.

    Post-norm is the order of arXiv:1706.03762 and BERT; pre-norm is analysed in arXiv:2002.04745.
    ``window`` is the layer's entry in ``config.windows``. Families whose layer differs override a
    method.
    """

    config: TransformerConfig
    compute: ComputeConfig
    cross_attention: bool = False
    window: int | None = None
    deterministic: bool = True

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerOutput]:
        """Hidden states [B, T, D] to hidden states, with this layer's ``cache`` if there is one."""
        own, cross = (None, None) if cache is None else (cache.own, cache.cross)
        y_BTD, own = self.self_attention(self.pre_norm("attention", x_BTD), inputs, own)
        x_BTD = self.residual("attention", x_BTD, y_BTD)
        if self.cross_attention:
            y_BTD, cross = self.attend_to_context(
                self.pre_norm("cross_attention", x_BTD), inputs, cross
            )
            x_BTD = self.residual("cross_attention", x_BTD, y_BTD)
        y_BTD, auxiliary = self.feed_forward(self.pre_norm("mlp", x_BTD), inputs)
        x_BTD = self.residual("mlp", x_BTD, y_BTD)
        updated = None if inputs.index is None else LayerCache(own, cross)
        return x_BTD, LayerOutput(updated, auxiliary)

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        """The attention sub-layer without norm and residual, and its keys and values."""
        mask = inputs.mask
        if self.window is not None:
            causal = mask is not None and mask.causal
            sides = (self.window - 1, 0) if causal else (self.window, self.window)
            mask = (mask or AttentionMask()).replace(window=sides)
        attention = Attention(self.config, self.compute, self.deterministic, name="attention")
        return attention(
            x_BTD, mask, rotary=inputs.rotary, bias=inputs.bias, cache=cache, index=inputs.index
        )

    def attend_to_context(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        """The cross-attention sub-layer without norm and residual, and its keys and values."""
        attention = Attention(self.config, self.compute, self.deterministic, name="cross_attention")
        return attention(
            x_BTD,
            inputs.context_mask,
            context_BSD=inputs.context_BSD,
            cache=cache if inputs.context_BSD is None else None,
        )

    def feed_forward(self, x_BTD: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, Any]:
        """The feed-forward sub-layer without norm and residual, and its auxiliary sums or None."""
        del inputs
        return FeedForward(self.config, self.compute, self.deterministic, name="mlp")(x_BTD), None

    def pre_norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """The input of the sub-layer ``name``."""
        c = self.config
        return self.norm(name)(x_BTD) if c.norm_position == "pre" else x_BTD

    def residual(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """Add the output ``y`` of the sub-layer ``name`` to its input ``x``."""
        c = self.config
        dropout = Dropout(c.dropout, self.compute.dropout_generator)
        x_BTD = x_BTD + dropout(y_BTD, self.deterministic)
        return constrain(self.norm(name)(x_BTD) if c.norm_position == "post" else x_BTD, HIDDEN)

    def norm(self, name: str) -> nn.Module:
        """The norm of the sub-layer ``name``."""
        return make_norm(self.config, self.dtype, name=f"{name}_norm")
