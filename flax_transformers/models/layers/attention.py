"""Multi-head self-attention and cross-attention, with or without a cache."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import ComputeConfig, TextConfig, TransformerConfig
from flax_transformers.models.kernels.cached import cached_attention
from flax_transformers.models.kernels.dispatch import (
    dot_product_attention,
    probabilities_of_keys,
)
from flax_transformers.models.kernels.kv_cache import KeyValues
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.models.layers.linear import Linear
from flax_transformers.models.layers.norms import HeadNorm
from flax_transformers.models.layers.positions import rotate
from flax_transformers.parallel.partitioning import HEADS, KEY_HEADS, constrain


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762 §3.2.2), with grouped key-value heads if configured.

    Kernels have an axis of heads ([D, N, H] and [N, H, D]) that a mesh axis can divide. Calls with
    ``mutable=["intermediates"]`` get the ``probabilities`` float32 [B, N, T, S] of each layer.
    """

    config: TransformerConfig
    compute: ComputeConfig
    deterministic: bool = True

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask: AttentionMask | None = None,
        *,
        context_BSD: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        bias: RelativePositionBias | None = None,
        cache: KeyValues | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """[B, T, D] to [B, T, D], and the keys and values that the queries attended to.

        Keys and values come from ``context_BSD`` if given, otherwise from ``x_BTD``. With a
        ``cache`` and an ``index`` (int32 scalar) they take the slots from that one on; a ``cache``
        without ``index`` is used as it is, and an ``index`` without cache is that of an empty one.
        """
        c = self.config
        q_BTNH = constrain(self._project("query", c.num_heads, x_BTD), HEADS)
        q_BTNH = self._placed("query", q_BTNH, rotary)
        own = None
        if cache is None or index is not None:
            own = self._keys_and_values(x_BTD if context_BSD is None else context_BSD, rotary)
        if cache is not None:
            attended_BTNH, kept = cached_attention(
                q_BTNH,
                cache,
                own,
                index,
                mask=mask,
                bias=bias,
                scale=c.attention_scale,
                softcap=c.attention_softcap,
            )
        else:
            assert own is not None
            kept = KeyValues.of(*own)
            self._sow_probabilities(q_BTNH, own[0], mask, bias)
            # The masks of prompts have positions, and initialisation tiny inputs: only plain XLA
            # fits these.
            plain = index is not None or self.is_initializing()
            dropping = c.attention_dropout > 0.0 and not self.deterministic
            attended_BTNH = dot_product_attention(
                q_BTNH,
                *own,
                mask=mask,
                bias=bias,
                scale=c.attention_scale,
                softcap=c.attention_softcap,
                dropout_rate=c.attention_dropout if dropping else 0.0,
                dropout_key=self.make_rng("dropout") if dropping else None,
                dropout_generator=self.compute.dropout_generator,
                kernel="auto" if plain else self.compute.attention,
            )
        output = Linear(
            # einsum sums over axes in the order of their letters: with a cache in that of memory,
            # which spares a transposed copy of the kernel for each token.
            "BTNH,NHD->BTD" if cache is None and index is None else "BTGH,GHD->BTD",
            (c.num_heads, c.value_width, x_BTD.shape[-1]),
            ("heads", "head_dim", "embed"),
            dtype=self.dtype,
            use_bias=c.output_bias,
            init_std=c.initial_std("output"),
            name="output",
        )
        return output(constrain(attended_BTNH, HEADS)), kept

    def _sow_probabilities(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        mask: AttentionMask | None,
        bias: RelativePositionBias | None,
    ) -> None:
        if self.is_mutable_collection("intermediates"):
            probabilities_BNTS = probabilities_of_keys(
                q_BTNH,
                k_BSKH,
                mask=mask,
                bias=bias,
                scale=self.config.attention_scale,
                softcap=self.config.attention_softcap,
            )
            self.sow("intermediates", "probabilities", probabilities_BNTS)

    def _keys_and_values(
        self, x_BSD: jax.Array, rotary: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys, rotated, and values [B, S, K, H]."""
        project = partial(self._project, heads=self.config.kv_heads, x_BTD=x_BSD)
        k_BSKH = self._placed("key", constrain(project("key"), KEY_HEADS), rotary)
        return k_BSKH, constrain(project("value"), KEY_HEADS)

    def _placed(
        self, name: str, x_BTNH: jax.Array, rotary: tuple[jax.Array, jax.Array] | None
    ) -> jax.Array:
        """Queries or keys after their norm and rotation, where the model has these."""
        c = self.config
        if c.query_key_norm != "none":
            axis = "heads" if name == "query" else "key_heads"
            x_BTNH = HeadNorm(c, self.dtype, axis, name=f"{name}_norm")(x_BTNH)
        if rotary is None:
            return x_BTNH
        rope = c.rope if isinstance(c, TextConfig) else None
        return rotate(x_BTNH, rotary, interleaved=rope is not None and rope.interleaved)

    def _project(self, name: str, heads: int, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return Linear(
            "BTD,DNH->BTNH",
            (x_BTD.shape[-1], heads, c.value_width if name == "value" else c.head_width),
            ("embed", "heads" if name == "query" else "key_heads", "head_dim"),
            dtype=self.dtype,
            use_bias=c.key_bias if name == "key" else c.qkv_bias,
            init_std=c.initial_std(name),
            name=name,
        )(x_BTD)
