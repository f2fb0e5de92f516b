"""A mixture of experts: each token goes to the few feed-forwards that a router picks for it.

Nothing is dropped: every token gets all the experts it was given, however full they are
(MegaBlocks, arXiv:2211.15841). The tokens are sorted by expert, and one product over groups of
rows takes each group through its own kernel.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from flax_transformers.models.feed_forward import ACTIVATIONS
from flax_transformers.models.linear import PROJECTION, Linear, truncated_normal

if TYPE_CHECKING:
    from flax_transformers.models.config import TransformerConfig


class Routing(struct.PyTreeNode):
    """Where the router sends each token.

    ``probabilities`` float32 [B, T, E] over all experts; ``experts`` int32 [B, T, C] the chosen
    ones, the best first; ``weights`` float32 [B, T, C] what their outputs are multiplied with.
    """

    probabilities: jax.Array
    experts: jax.Array
    weights: jax.Array


class Balance(struct.PyTreeNode):
    """How evenly a layer used its experts, summed over the tokens of each sequence, in float32.

    ``chosen`` [B, E]: how many tokens each expert got. ``probability`` [B, E]: the sum of what the
    router gave each expert. ``tokens`` [B]: how many tokens there were. Padding does not count.
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
        c = self.config
        batch, length, width = x_BTD.shape
        routing = self._route(x_BTD)
        up_EDF = self._kernels("up", (width, c.intermediate_size), ("embed", "mlp"))
        gate_EDF = self._kernels("gate", (width, c.intermediate_size), ("embed", "mlp"))
        down_EFD = self._kernels("down", (c.intermediate_size, width), ("mlp", "embed"))
        # Rows: each token once per choice, those of expert 0 first.
        expert_R = routing.experts.reshape(-1)
        order_R = jnp.argsort(expert_R)
        sizes_E = jnp.bincount(expert_R, length=self.experts).astype(jnp.int32)
        x_RD = x_BTD.astype(self.dtype).reshape(-1, width)[order_R // self.choices]
        up_RF = _named(grouped_product(x_RD, up_EDF, sizes_E))
        gate_RF = _named(grouped_product(x_RD, gate_EDF, sizes_E))
        inner_RF = ACTIVATIONS[c.activation](gate_RF) * up_RF
        y_RD = _named(grouped_product(inner_RF, down_EFD, sizes_E))
        y_RD = y_RD[jnp.argsort(order_R)]  # back to the order of tokens
        y_BTCD = y_RD.reshape(batch, length, self.choices, width).astype(jnp.float32)
        y_BTD = jnp.sum(y_BTCD * routing.weights[..., None], axis=2)
        return y_BTD.astype(self.dtype), routing

    def _route(self, x_BTD: jax.Array) -> Routing:
        c = self.config
        router = Linear(
            "BTD,DE->BTE",
            (x_BTD.shape[-1], self.experts),
            ("embed", "router"),
            dtype=jnp.dtype(jnp.float32),
            use_bias=False,
            init_std=c.init_std,
            name="router",
        )
        probabilities_BTE = jax.nn.softmax(router(x_BTD), axis=-1)
        best_BTC, experts_BTC = jax.lax.top_k(probabilities_BTE, self.choices)
        weights_BTC = best_BTC / jnp.sum(best_BTC, axis=-1, keepdims=True)
        return Routing(probabilities_BTE, experts_BTC, weights_BTC)

    def _kernels(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array:
        std = self.config.initial_std(name)
        return _Kernels((self.experts, *shape), ("expert", *axes), std, name=name)().astype(
            self.dtype
        )


def _named(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, PROJECTION)


class _Kernels(nn.Module):
    """One kernel for each expert, without biases."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    init_std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(truncated_normal(self.init_std), self.axes)
        return self.param("kernel", init, self.shape, jnp.float32)


@jax.custom_vjp
def grouped_product(x_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The first ``sizes_E[0]`` rows of x times the first kernel, the next times the second ...

    [R, F] in the dtype of ``x_RD``; sums run in float32, in the backward pass too, where the
    cotangent is first cast to the dtype of the operands (as in ``linear.einsum``).
    """
    product = jax.lax.ragged_dot(x_RD, kernel_EDF, sizes_E, preferred_element_type=jnp.float32)
    return product.astype(x_RD.dtype)


def _grouped_product_forward(
    x_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return grouped_product(x_RD, kernel_EDF, sizes_E), (x_RD, kernel_EDF, sizes_E)


_KERNEL_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""Rows are summed over, group by group: [R, D] and [R, F] give [E, D, F]."""


def _grouped_product_backward(
    operands: tuple[jax.Array, jax.Array, jax.Array], cotangent_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_RD, kernel_EDF, sizes_E = operands
    x_gradient = grouped_product(cotangent_RF, kernel_EDF.swapaxes(1, 2), sizes_E)
    kernel_gradient = jax.lax.ragged_dot_general(
        x_RD, cotangent_RF, sizes_E, _KERNEL_GRADIENT, preferred_element_type=jnp.float32
    )
    return x_gradient, kernel_gradient.astype(kernel_EDF.dtype), None


grouped_product.defvjp(_grouped_product_forward, _grouped_product_backward)


def balance_of(routing: Routing, segments_BT: jax.Array | None) -> Balance:
    """Sums a layer's routing over the tokens of each sequence; segment 0 is padding."""
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
