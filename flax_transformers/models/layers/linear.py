"""The linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_transformers.parallel.matmul import PROJECTION, weighted


class Linear(nn.Module):
    """An affine map over named axes: ``einsum(spec, x, kernel) + bias``.

    ``spec`` such as "BTD,DNH->BTNH"; ``shape`` is the kernel's, ``axes`` its logical axis names.
    The bias covers the kernel axes that remain in the result.
    """

    spec: str
    shape: Sequence[int]
    axes: Sequence[str]
    dtype: jnp.dtype
    use_bias: bool = True
    init_std: float = 0.02

    def setup(self) -> None:
        kernel_init = nn.with_logical_partitioning(truncated_normal(self.init_std), self.axes)
        self.kernel = self.param("kernel", kernel_init, tuple(self.shape), jnp.float32)
        if self.use_bias:
            operands, result = self.spec.split("->")
            kept = [i for i, letter in enumerate(operands.split(",")[1]) if letter in result]
            axes, shape = (tuple(of[i] for i in kept) for of in (self.axes, self.shape))
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            self.bias = self.param("bias", bias_init, shape, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = weighted(self.spec, tuple(self.axes), x.astype(self.dtype), self.kernel)
        return self.add_bias(checkpoint_name(y, PROJECTION))

    def add_bias(self, y: jax.Array) -> jax.Array:
        """``y`` plus the bias, if there is one."""
        if not self.use_bias:
            return y
        bias = jnp.expand_dims(self.bias, tuple(range(y.ndim - self.bias.ndim)))
        # Broadcast first, round after: the gradient then sums over tokens in float32.
        return y + jnp.broadcast_to(bias, y.shape).astype(self.dtype)


def feature_map(
    inputs: int,
    outputs: int,
    dtype: jnp.dtype,
    *,
    init_std: float,
    use_bias: bool = True,
    name: str | None = None,
) -> Linear:
    """A linear layer between features, [B, T, inputs] to [B, T, outputs]."""
    axes = ("embed", "features")
    return Linear("BTD,DE->BTE", (inputs, outputs), axes, dtype, use_bias, init_std, name=name)


def truncated_normal(std: float) -> nn.initializers.Initializer:
    """Normal cut at two standard deviations, as BERT's ``truncated_normal_initializer``.

    ``std`` is that of the normal before the cut, the convention of TensorFlow's initializer.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init
