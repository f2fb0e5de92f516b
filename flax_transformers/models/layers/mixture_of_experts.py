"""Mixture of experts: a router sends each token to a few of many feed-forward layers.

This file has the router and the balancing loss; ``kernels/expert_parallelism.py`` applies the
experts, on one device or over a mesh.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.kernels.expert_parallelism import AXES, mix_experts
from flax_transformers.models.layers.feed_forward import ACTIVATIONS
from flax_transformers.models.layers.linear import Linear, truncated_normal
from flax_transformers.parallel.partitioning import gradient_dtype


class Routing(struct.PyTreeNode):
    """The router's choices.

    ``probabilities`` float32 [B, T, E] over all experts; ``experts`` int32 [B, T, C] the chosen
    ones, the most probable first; ``weights`` float32 [B, T, C] the factors on their outputs.
    """

    probabilities: jax.Array
    experts: jax.Array
    weights: jax.Array


class Balance(struct.PyTreeNode):
    """How evenly a layer used its experts, summed over the tokens of each sequence, in float32.

    ``chosen`` [B, E]: number of tokens of each expert. ``probability`` [B, E]: sum of the router's
    probabilities. ``tokens`` [B]: number of tokens. Padding does not count.
    A model stacks these over layers, [L, B, ...].
    """

    chosen: jax.Array
    probability: jax.Array
    tokens: jax.Array

    def by_sequence(self) -> tuple[jax.Array, jax.Array]:
        """Sum and weight of the loss that objectives add; see ``balancing_by_sequence``."""
        return balancing_by_sequence(self)


class MixtureOfExperts(nn.Module):
    """Gated feed-forwards of which each token uses ``choices``, weighted by the router.

    The router's probabilities are a softmax over all experts in float32; those of the chosen ones,
    scaled to sum to one, weight their outputs (Mixtral, arXiv:2401.04088 §2.1). [B, T, D] to
    [B, T, D], and the ``Routing``.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    experts: int
    choices: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        c, width = self.config, x_BTD.shape[-1]
        router = Linear(
            "BTD,DE->BTE",
            (width, self.experts),
            ("embed", "router"),
            dtype=jnp.dtype(jnp.float32),
            use_bias=False,
            init_std=c.init_std,
            name="router",
        )
        probabilities_BTE = jax.nn.softmax(router(x_BTD), axis=-1)
        sizes = {"expert": self.experts, "embed": width, "mlp": c.intermediate_size}
        kernels = {}
        for name, axes in AXES.items():
            shape = sizes[axes[0]], sizes[axes[1]], sizes[axes[2]]
            kernel = _Kernels(shape, axes, c.initial_std(name), name=name)()
            kernels[name] = kernel.astype(gradient_dtype(self.dtype))
        activation = ACTIVATIONS[c.activation]
        y_BTD, experts_BTC, weights_BTC = mix_experts(
            x_BTD.astype(self.dtype), probabilities_BTE, kernels, self.choices, activation
        )
        return y_BTD, Routing(probabilities_BTE, experts_BTC, weights_BTC)


class _Kernels(nn.Module):
    """One kernel for each expert, without biases."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    init_std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(truncated_normal(self.init_std), self.axes)
        return self.param("kernel", init, self.shape, jnp.float32)


def balance_of(routing: Routing, segments_BT: jax.Array | None) -> Balance:
    """Sum a layer's routing over the tokens of each sequence; segment 0 is padding."""
    experts = routing.probabilities.shape[-1]
    token_BT = (
        jnp.ones(routing.experts.shape[:2], jnp.float32)
        if segments_BT is None
        else (segments_BT > 0).astype(jnp.float32)
    )
    chosen_BTE = jnp.sum(jax.nn.one_hot(routing.experts, experts), axis=2)
    total = partial(jnp.einsum, "BTE,BT->BE", precision=jax.lax.Precision.HIGHEST)
    return Balance(
        chosen=total(chosen_BTE, token_BT),
        probability=total(routing.probabilities, token_BT),
        tokens=jnp.sum(token_BT, axis=1),
    )


def balancing_by_sequence(balance: Balance) -> tuple[jax.Array, jax.Array]:
    """The sum over sequences of the ``balance_loss`` of each, times its tokens; and all tokens.

    ``balance`` is that of a model, [L, B, ...]. Both results add up over micro-batches and devices,
    and their quotient, the mean over tokens, is the same however a batch was divided. The originals
    have ``balance_loss`` of the whole batch, which for a single sequence is the same.
    """
    each = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), balance)
    tokens_B = balance.tokens[0]
    return jnp.sum(balance_loss(each) * tokens_B), jnp.sum(tokens_B)


def balance_loss(sums: Balance) -> jax.Array:
    """The load-balancing loss of the Switch Transformer (arXiv:2101.03961 §2.2), as in Mixtral.

    ``E * sum_e f_e P_e`` float32 [...], with f_e the tokens that expert e got for each token there
    was, and P_e its mean probability, of sums over tokens and layers [..., E]. At perfect balance
    it is the number of choices.
    """
    tokens = jnp.maximum(sums.tokens, 1.0)[..., None]
    share, probability = sums.chosen / tokens, sums.probability / tokens
    return sums.chosen.shape[-1] * jnp.sum(share * probability, axis=-1)
