"""The standard layer: attention, then feed-forward, each with a residual and a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.models.layers.attention import Attention, KeyValues
from flax_transformers.models.layers.feed_forward import FeedForward
from flax_transformers.models.layers.masks import AttentionMask
from flax_transformers.models.layers.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.sharding import HIDDEN, constrain

if TYPE_CHECKING:
    from flax_transformers.models.config import ComputeConfig, TransformerConfig


class LayerInputs(struct.PyTreeNode):
    """What every layer of a stack gets, besides the hidden states.

    ``mask`` and ``context_mask`` say what self-attention and cross-attention may look at.
    ``rotary``: what the config's ``rotary_tables`` made. ``bias`` is added to the scores of
    self-attention. ``context_BSD``: what cross-attention looks at; None once its keys and
    values are cached. ``index``: where new keys and values go in the cache, an int32 scalar.
    """

    mask: AttentionMask | None = None
    rotary: Any = None
    bias: RelativePositionBias | None = None
    context_BSD: jax.Array | None = None
    context_mask: AttentionMask | None = None
    index: jax.Array | None = None


class LayerCache(struct.PyTreeNode):
    """Keys and values that one layer keeps between calls; ``cross`` of the context, if any."""

    own: KeyValues
    cross: KeyValues | None = None


class TransformerBlock(nn.Module):
    """One layer, pre-norm ``x + f(norm(x))`` or post-norm ``norm(x + f(x))``.

    Post-norm is the order of arXiv:1706.03762 and BERT; pre-norm is analysed in arXiv:2002.04745.
    Families whose layer differs override one of the methods.
    """

    config: TransformerConfig
    compute: ComputeConfig
    cross_attention: bool = False
    deterministic: bool = True

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, own: LayerCache | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """``own`` is this layer's cache or None. Returns the new hidden states and, in a dict, the
        renewed ``cache`` (if there was one) and ``auxiliary`` sums (if the layer has any)."""
        out: dict[str, Any] = {}
        seen: dict[str, KeyValues] = {}

        def attention(x_BTD: jax.Array) -> jax.Array:
            y_BTD, seen["own"] = self.self_attention(
                x_BTD, inputs, None if own is None else own.own
            )
            return y_BTD

        def cross_attention(x_BTD: jax.Array) -> jax.Array:
            y_BTD, seen["cross"] = Attention(
                self.config, self.compute, self.deterministic, name="cross_attention"
            )(
                x_BTD,
                inputs.context_mask,
                context_BSD=inputs.context_BSD,
                cache=own.cross if own is not None and inputs.context_BSD is None else None,
            )
            return y_BTD

        def mlp(x_BTD: jax.Array) -> jax.Array:
            y_BTD, auxiliary = self.feed_forward(x_BTD)
            if auxiliary is not None:
                out["auxiliary"] = auxiliary
            return y_BTD

        x_BTD = self.residual(x_BTD, attention, "attention")
        if self.cross_attention:
            x_BTD = self.residual(x_BTD, cross_attention, "cross_attention")
        x_BTD = self.residual(x_BTD, mlp, "mlp")
        if own is not None:
            out["cache"] = LayerCache(**seen)
        return x_BTD, out

    def self_attention(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        """The attention sub-layer, without norm and residual."""
        attention = Attention(self.config, self.compute, self.deterministic, name="attention")
        return attention(
            x_BTD,
            inputs.mask,
            rotary=inputs.rotary,
            bias=inputs.bias,
            cache=cache,
            index=inputs.index,
        )

    def feed_forward(self, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        """The feed-forward sub-layer, without norm and residual, and its auxiliary sums or None."""
        mlp = FeedForward(self.config, self.compute, self.deterministic, name="mlp")
        return mlp(x_BTD), None

    def residual(
        self, x_BTD: jax.Array, f: Callable[[jax.Array], jax.Array], name: str
    ) -> jax.Array:
        """Adds a sub-layer, named ``name``, with its norm and dropout."""
        c = self.config
        norm = c.make_norm(self.dtype, name=f"{name}_norm")
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        if c.norm_position == "pre":
            x_BTD = x_BTD + dropout(f(norm(x_BTD)))
        else:
            x_BTD = norm(x_BTD + dropout(f(x_BTD)))
        return constrain(x_BTD, HIDDEN)
