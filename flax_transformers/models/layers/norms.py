"""Layer norm (arXiv:1607.06450) and RMS norm (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.kernels.closed_form import standardized


def make_norm(
    config: TransformerConfig, dtype: jnp.dtype, name: str | None = None, *, axis: str = "norm"
) -> nn.Module:
    """The norm of a model, over the last axis, with parameters ``scale`` and perhaps ``bias``.

    Statistics are float32. ``axis``: "input_norm" for a norm of what the layers read, outside the
    folder of embeddings, whose learning rate it has (``optim.selection.depths``).
    """
    eps = config.norm_eps
    scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,))
    if config.norm_offset:
        return OffsetRMSNorm(eps, config.norm_offset, dtype, name=name)
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=eps, dtype=dtype, scale_init=scale_init, name=name)
    return LayerNorm(eps, config.norm_bias, dtype, axis, name=name)


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450) over the last axis, in float32 throughout and rounded last."""

    eps: float
    use_bias: bool
    dtype: jnp.dtype
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def parameter(name: str, init: nn.initializers.Initializer) -> jax.Array:
            init = nn.with_logical_partitioning(init, (self.axis,))
            value = self.param(name, init, (x.shape[-1],), jnp.float32)
            return jnp.expand_dims(value, tuple(range(x.ndim - 1)))

        y = standardized(x, self.eps) * parameter("scale", nn.initializers.ones_init())
        if self.use_bias:
            y += parameter("bias", nn.initializers.zeros_init())
        return y.astype(self.dtype)


class HeadNorm(nn.Module):
    """Norm of queries or keys [B, T, N, H], of the model's kind and without a bias.

    "shared": of each head, with one scale [H] for all (Qwen 3). "each": of each head, with scales
    [N, H] (Command R+). "all": of all heads together, with scales [N, H] (OLMo 2). ``axis`` is the
    logical axis of the heads.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    axis: str

    @nn.compact
    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        c, kind = self.config, self.config.query_key_norm
        over = (-2, -1) if kind == "all" else -1
        own = slice(1 if kind == "shared" else 0, None)
        shape, axes = x_BTNH.shape[-2:][own], (self.axis, "norm")[own]
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), axes)
        scale = self.param("scale", init, shape, jnp.float32)
        x_BTNH = x_BTNH.astype(jnp.float32)
        if c.norm == "layer":
            x_BTNH -= jnp.mean(x_BTNH, axis=over, keepdims=True)
        square = jnp.mean(jnp.square(x_BTNH), axis=over, keepdims=True)
        y_BTNH = x_BTNH * jax.lax.rsqrt(square + c.norm_eps)
        return (y_BTNH * jnp.expand_dims(scale, (0, 1, 2)[: 4 - scale.ndim])).astype(self.dtype)


class OffsetRMSNorm(nn.Module):
    """RMS norm whose factor is ``offset + scale``, in float32 throughout and rounded last."""

    eps: float
    offset: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        x = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(square + self.eps) * (self.offset + scale)).astype(self.dtype)
