"""Mixtures of experts: every token gets its experts, and how evenly they are used is summed up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.layers.feed_forward import ACTIVATIONS
from flax_transformers.models.layers.mixture_of_experts import (
    Balance,
    MixtureOfExperts,
    Routing,
    balance_loss,
    balance_of,
    balancing_by_sequence,
)
from flax_transformers.parallel.rules import mesh_axes
from flax_transformers.testing import relative_difference
from tests.models.reference import randomize


@dataclass(frozen=True, kw_only=True)
class Tiny(TransformerConfig):
    """The sizes of a layer."""


CONFIG = Tiny(
    hidden_size=6,
    num_layers=1,
    num_heads=1,
    intermediate_size=5,
    activation="silu",
    init_std=0.5,
)
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7, 6), np.float32))


def make(experts=4, choices=2, dtype="float32"):
    module = MixtureOfExperts(CONFIG, jnp.dtype(dtype), experts, choices)
    boxed = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    return module, randomize(nn.meta.unbox(boxed), std=0.5)


@partial(jax.jit, static_argnums=2)
def dense(params, x, choices):
    """All experts for all tokens, of which the chosen ones count."""
    kernels = {name: group["kernel"] for name, group in params.items()}
    probabilities = jax.nn.softmax(x @ kernels["router"])
    best, chosen = jax.lax.top_k(probabilities, choices)
    best = best / best.sum(axis=-1, keepdims=True)
    up = jnp.einsum("btd,edf->betf", x, kernels["up"])
    gate = ACTIVATIONS[CONFIG.activation](jnp.einsum("btd,edf->betf", x, kernels["gate"]))
    each = jnp.einsum("betf,efd->bted", gate * up, kernels["down"])
    picked = jnp.take_along_axis(each, chosen[..., None], axis=2)
    return jnp.sum(picked * best[..., None], axis=2)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "choices"), [(4, 2), (5, 3), (3, 1), (2, 2)])
def test_every_token_gets_the_weighted_sum_of_its_experts(experts, choices):
    module, params = make(experts, choices)
    found, routing = jax.jit(module.apply)({"params": params}, X)
    assert relative_difference(found, dense(params, X, choices)) < 1e-5
    np.testing.assert_allclose(routing.weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_an_expert_may_get_all_tokens_and_another_none():
    module, params = make(4, 1)
    x = jnp.abs(X)  # the router's first kernel is the only one that likes positive numbers
    params["router"]["kernel"] = jnp.full((6, 4), -1.0).at[:, 2].set(1.0)
    found, routing = jax.jit(module.apply)({"params": params}, x)
    assert (routing.experts == 2).all()
    assert relative_difference(found, dense(params, x, 1)) < 1e-5


@pytest.mark.slow
def test_the_gradients_are_those_of_the_dense_form():
    module, params = make()

    def loss(params, x):
        return jnp.sum(jnp.sin(module.apply({"params": params}, x)[0]))

    def dense_loss(params, x):
        return jnp.sum(jnp.sin(dense(params, x, 2)))

    found = jax.jit(jax.grad(loss, (0, 1)))(params, X)
    expected = jax.jit(jax.grad(dense_loss, (0, 1)))(params, X)
    worst = jax.tree.map(relative_difference, found, expected)
    assert max(jax.tree.leaves(worst)) < 1e-5


@pytest.mark.slow
def test_bfloat16_rounds_the_experts_but_not_the_router():
    module, params = make(dtype="bfloat16")
    exact, routing = jax.jit(make()[0].apply)({"params": params}, X)
    found, rounded_routing = jax.jit(module.apply)({"params": params}, X)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded_routing.experts, routing.experts)
    np.testing.assert_allclose(rounded_routing.probabilities, routing.probabilities, rtol=1e-6)
    assert 1e-4 < relative_difference(found.astype(jnp.float32), exact) < 2e-2

    def loss(params, module):
        return jnp.sum(jnp.sin(module.apply({"params": params}, X)[0].astype(jnp.float32)))

    rounded = jax.jit(jax.grad(loss), static_argnums=1)(params, module)
    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, make()[0])
    worst = jax.tree.map(relative_difference, rounded, plain)
    assert max(jax.tree.leaves(worst)) < 5e-2


def test_parameters_have_logical_axes_with_a_rule():
    module = MixtureOfExperts(CONFIG, jnp.dtype("float32"), 4, 2)
    specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), X)["params"])
    assert tuple(specs["up"]["kernel"]) == ("expert", "embed", "mlp")
    assert tuple(specs["down"]["kernel"]) == ("expert", "mlp", "embed")
    for group in specs.values():
        mesh_axes(group["kernel"])


def routing_of(experts, probabilities):
    """A routing of one sequence to single experts."""
    chosen = jnp.array(experts, jnp.int32)[None, :, None]
    return Routing(jnp.array(probabilities)[None], chosen, jnp.ones(chosen.shape))


@pytest.mark.slow
def test_balance_counts_tokens_and_not_padding():
    routing = routing_of([0, 1, 1], [[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]])
    balance = balance_of(routing, jnp.array([[1, 2, 0]]))
    np.testing.assert_allclose(balance.chosen, [[1.0, 1.0]])
    np.testing.assert_allclose(balance.probability, [[1.15, 0.85]])
    np.testing.assert_allclose(balance.tokens, [2.0])
    assert balance_of(routing, None).tokens.tolist() == [3.0]


def layers(*balances):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *balances)


def some_balance(seed, sequences=4):
    random, tokens = np.random.default_rng(seed), np.arange(3, 3 + sequences, dtype=np.float32)
    chosen, probability = random.dirichlet(np.ones(5), (2, sequences)) * tokens[:, None]
    return Balance(np.float32(2 * chosen), np.float32(probability), tokens)


@pytest.mark.slow
def test_the_load_balancing_loss_is_the_number_of_choices_at_perfect_balance():
    share = 8.0 * jnp.full(5, 0.2)
    assert float(balance_loss(Balance(2 * share, share, jnp.array(8.0)))) == pytest.approx(2.0)


@pytest.mark.slow
def test_the_balance_of_sequences_adds_up_however_a_batch_is_divided():
    balance = layers(some_balance(0), some_balance(1))
    by_sequence = jax.jit(balancing_by_sequence)
    total, weight = by_sequence(balance)
    halves = [
        by_sequence(jax.tree.map(lambda leaf, part=part: leaf[:, part], balance))
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert float(weight) == sum(float(half[1]) for half in halves) == 18.0
    assert float(total) == pytest.approx(sum(float(half[0]) for half in halves), rel=1e-6)
    total, weight = by_sequence(jax.tree.map(lambda leaf: leaf[:, :1], balance))
    alone = jax.tree.map(lambda leaf: leaf[:, 0].sum(axis=0), balance)
    assert float(total / weight) == pytest.approx(float(balance_loss(alone)), rel=1e-6)


def test_a_sequence_of_padding_alone_adds_nothing():
    nothing = Balance(jnp.zeros((1, 5)), jnp.zeros((1, 5)), jnp.zeros(1))
    assert [float(value) for value in balancing_by_sequence(layers(nothing))] == [0.0, 0.0]
