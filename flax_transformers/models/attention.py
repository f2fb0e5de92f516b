"""Multi-head attention, and the masks that say who may look at whom."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.kernels import dot_product_attention
from flax_transformers.models.linear import Linear
from flax_transformers.models.sharding import HEADS, constrain


def segment_mask(query_segments_BT: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
    """bool [B, T, S]: True where query and key are in the same segment.

    Padding is segment 0, so a plain attention mask of ones and zeros is the segments of a row that
    holds one example: tokens see tokens, and padding, whose outputs nobody reads, sees padding.
    """
    return query_segments_BT[:, :, None] == key_segments_BS[:, None, :]


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762 §3.2.2), [B, T, D] to [B, T, D].

    Kernels keep heads apart ([D, N, H] and [N, H, D]), so that a mesh axis can divide the heads.
    """

    num_heads: int
    head_dim: int
    dtype: jnp.dtype
    use_bias: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
        width, heads, head_dim = x_BTD.shape[-1], self.num_heads, self.head_dim
        linear = partial(Linear, dtype=self.dtype, use_bias=self.use_bias, init_std=self.init_std)
        project = partial(
            linear, "BTD,DNH->BTNH", (width, heads, head_dim), ("embed", "heads", "head_dim")
        )
        q_BTNH = constrain(project(name="query")(x_BTD), HEADS)
        k_BTNH = constrain(project(name="key")(x_BTD), HEADS)
        v_BTNH = constrain(project(name="value")(x_BTD), HEADS)
        dropping = self.dropout > 0.0 and not self.deterministic
        attended_BTNH = dot_product_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            mask_BTS=mask_BTS,
            dropout_rate=self.dropout if dropping else 0.0,
            dropout_key=self.make_rng("dropout") if dropping else None,
        )
        output = linear(
            "BTNH,NHD->BTD",
            (heads, head_dim, width),
            ("heads", "head_dim", "embed"),
            name="output",
        )
        return output(constrain(attended_BTNH, HEADS))
