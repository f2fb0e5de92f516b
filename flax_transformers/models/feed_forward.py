"""The position-wise half of a layer: plain and gated multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.linear import Linear
from flax_transformers.models.sharding import INTERMEDIATE, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (arXiv:2002.05202).

    [B, T, D] to [B, T, D] through ``intermediate_size`` F.
    """

    intermediate_size: int
    activation: str
    gated: bool
    dtype: jnp.dtype
    use_bias: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width, inner = x_BTD.shape[-1], self.intermediate_size
        linear = partial(Linear, dtype=self.dtype, use_bias=self.use_bias, init_std=self.init_std)
        into = partial(linear, "BTD,DF->BTF", (width, inner), ("embed", "mlp"))
        act = ACTIVATIONS[self.activation]
        up_BTF = constrain(into(name="up")(x_BTD), INTERMEDIATE)
        if self.gated:
            up_BTF = act(constrain(into(name="gate")(x_BTD), INTERMEDIATE)) * up_BTF
        else:
            up_BTF = act(up_BTF)
        down = linear("BTF,FD->BTD", (inner, width), ("mlp", "embed"), name="down")
        return down(up_BTF)
