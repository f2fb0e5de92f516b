"""Position-wise feed-forward layers, plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.models.kernels.chunked_feed_forward import (
    can_be_chunked,
    chunked_feed_forward,
)
from flax_transformers.models.kernels.closed_form import gelu, gelu_tanh
from flax_transformers.models.layers.dropout import Dropout
from flax_transformers.models.layers.linear import Linear
from flax_transformers.parallel.partitioning import INTERMEDIATE, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (arXiv:2002.05202).

    [B, T, D] to [B, T, D] through ``intermediate_size`` F.
    """

    config: TransformerConfig
    compute: ComputeConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        inner = c.intermediate_size
        linear = partial(Linear, dtype=jnp.dtype(self.compute.dtype), use_bias=c.mlp_bias)
        into = partial(
            linear,
            "BTD,DF->BTF",
            (c.hidden_size, inner),
            ("embed", "mlp"),
            init_std=c.initial_std("up"),
        )
        self.up = into()
        if c.gated:
            self.gate = into()
        self.down = linear(
            "BTF,FD->BTD",
            (inner, c.hidden_size),
            ("mlp", "embed"),
            init_std=c.initial_std("down"),
        )
        self.dropout = Dropout(c.activation_dropout, self.compute.dropout_generator)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, chunk = self.config, self.compute.feed_forward_chunk
        act = ACTIVATIONS[c.activation]
        drops = c.activation_dropout > 0.0 and not self.deterministic
        if chunk is not None and can_be_chunked(x_BTD, chunk) and not drops:
            x_BTD = x_BTD.astype(self.compute.dtype)
            return self.down.add_bias(chunked_feed_forward(act, chunk, x_BTD, self._weights()))
        up_BTF = constrain(self.up(x_BTD), INTERMEDIATE)
        if c.gated:
            up_BTF = act(constrain(self.gate(x_BTD), INTERMEDIATE)) * up_BTF
        else:
            up_BTF = act(up_BTF)
        return self.down(self.dropout(up_BTF, self.deterministic))

    def _weights(self) -> dict[str, jax.Array]:
        into = {"up": self.up, "gate": self.gate} if self.config.gated else {"up": self.up}
        weights = {name: layer.kernel for name, layer in into.items()}
        if self.config.mlp_bias:
            weights |= {f"{name}_bias": layer.bias for name, layer in into.items()}
        return weights | {"down": self.down.kernel}
