"""The standard layer: attention, then feed-forward, each with a residual and a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.attention import Attention
from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.feed_forward import FeedForward
from flax_transformers.models.norms import make_norm
from flax_transformers.models.sharding import HIDDEN, constrain


class TransformerBlock(nn.Module):
    """One encoder layer, pre-norm ``x + f(norm(x))`` or post-norm ``norm(x + f(x))``.

    Post-norm is the order of arXiv:1706.03762 and BERT; pre-norm is analysed in arXiv:2002.04745.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shared: Any, own: Any) -> tuple[jax.Array, None]:
        """``shared`` holds ``mask_BTS``, bool [B, T, S] or None; ``own`` is not used."""
        c = self.config
        attention = Attention(
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            dtype=self.dtype,
            use_bias=c.use_bias,
            dropout=c.attention_dropout,
            init_std=c.init_std,
            deterministic=self.deterministic,
            name="attention",
        )
        mlp = FeedForward(
            intermediate_size=c.intermediate_size,
            activation=c.activation,
            gated=c.gated,
            dtype=self.dtype,
            use_bias=c.use_bias,
            init_std=c.init_std,
            name="mlp",
        )
        x_BTD = self._residual(x_BTD, lambda x: attention(x, shared["mask_BTS"]), "attention_norm")
        x_BTD = self._residual(x_BTD, mlp, "mlp_norm")
        return x_BTD, None

    def _residual(
        self, x_BTD: jax.Array, f: Callable[[jax.Array], jax.Array], norm_name: str
    ) -> jax.Array:
        c = self.config
        norm = make_norm(c.norm, c.norm_eps, self.dtype, use_bias=c.use_bias, name=norm_name)
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        if c.norm_place == "pre":
            x_BTD = x_BTD + dropout(f(norm(x_BTD)))
        else:
            x_BTD = norm(x_BTD + dropout(f(x_BTD)))
        return constrain(x_BTD, HIDDEN)
