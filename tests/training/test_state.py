"""A fresh state, and where its parts lie."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from flax_transformers.errors import UserError
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.training.state import abstract_state, initialize_state, new_state

OPTIMIZER = AdamW().make(total_steps=10)


class Small(nn.Module):
    """A table of 6 words, 8 wide, and a kernel [8, 4]."""

    def example_inputs(self):
        return {"ids": jnp.zeros((1, 2), jnp.int32)}

    @nn.compact
    def __call__(self, ids):
        normal = nn.initializers.normal(1.0)
        table = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        kernel = nn.with_logical_partitioning(normal, ("embed", "mlp"))
        hidden = self.param("table", table, (6, 8), jnp.float32)[ids]
        return hidden @ self.param("kernel", kernel, (8, 4), jnp.float32)


def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def states(mesh, seed=0):
    abstract = abstract_state(Small(), OPTIMIZER, seed, mesh)
    with jax.set_mesh(mesh):
        return abstract, initialize_state(Small(), OPTIMIZER, seed, abstract)


@pytest.fixture(scope="module")
def divided():
    return states(mesh_of(2, 2, 2))


@pytest.mark.slow
def test_optimizer_statistics_lie_where_their_parameters_lie(divided):
    abstract, _ = divided
    kinds = {
        (leaf.shape, leaf.sharding.spec)
        for leaf in jax.tree.leaves((abstract.params, abstract.opt_state))
    }
    assert kinds == {
        ((6, 8), PartitionSpec("tensor", "fsdp")),
        ((8, 4), PartitionSpec("fsdp", "tensor")),
        ((), PartitionSpec()),  # the counts of updates
    }
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(abstract.params))


def test_the_abstract_state_says_what_the_fresh_one_is(divided):
    abstract, state = divided

    def kinds(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)

    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert kinds(abstract) == kinds(state)


def test_a_fresh_state_has_taken_no_steps(divided):
    _, state = divided
    for count in (state.step, state.skipped, state.consecutive_skips):
        assert (int(count), count.shape, count.dtype) == (0, (), jnp.int32)
    assert (state.rng.shape, state.rng.dtype) == ((2,), jnp.uint32)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_mesh(divided):
    """But for the last bit, where the compiler fuses a divided program in another way."""
    _, alone = states(mesh_of(1, 1, 1))
    for found, expected in zip(jax.tree.leaves(divided[1]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_each_seed_has_parameters_and_a_key_of_its_own(divided):
    _, other = states(mesh_of(1, 1, 1), seed=1)
    _, state = divided
    assert (np.asarray(other.params["kernel"]) != state.params["kernel"]).all()
    assert (np.asarray(other.rng) != state.rng).any()


@pytest.mark.slow
def test_the_key_of_the_run_is_not_the_one_the_parameters_came_from():
    state = new_state(Small(), OPTIMIZER, 0)
    again = Small().init(jax.random.wrap_key_data(state.rng), jnp.zeros((1), jnp.int32))
    fresh = nn.meta.unbox(state.params)["kernel"]
    assert (nn.meta.unbox(again)["params"]["kernel"] != fresh).all()


def test_a_parameter_that_the_mesh_does_not_divide_is_refused_before_anything_is_made():
    with pytest.raises(UserError, match="parameter table: its 'vocab' axis of 6 does not divide"):
        abstract_state(Small(), OPTIMIZER, 0, mesh_of(1, 2, 4))


class Normed(nn.Module):
    """A scale and running statistics of 3 features."""

    def example_inputs(self):
        return {"x": jnp.zeros(3)}

    @nn.compact
    def __call__(self, x):
        for name, start, axis in (
            ("scale", nn.initializers.ones, "norm"),
            ("mean", nn.initializers.zeros, "running"),
            ("variance", nn.initializers.constant(2.0), "running"),
        ):
            x = x * self.param(name, nn.with_logical_partitioning(start, (axis,)), (3,))
        return x


def normed_state(ema=False):
    mesh, optimizer = mesh_of(1), optax.sgd(0.1)
    abstract = abstract_state(Normed(), optimizer, 0, mesh, ema=ema)
    with jax.set_mesh(mesh):
        return abstract, initialize_state(Normed(), optimizer, 0, abstract)


@pytest.mark.parametrize("ema", [False, True])
def test_statistics_that_a_checkpoint_lacks_are_those_of_a_new_model(ema, caplog):
    abstract, state = normed_state(ema)
    found = state.replace(params={"scale": jnp.full(3, 5.0)}, model_state=None, ema=None)
    found = found.completed(abstract, Normed())
    expected = {"mean": np.zeros(3), "variance": np.full(3, 2.0)}
    jax.tree.map(np.testing.assert_array_equal, found.model_state, expected)
    average = expected | {"scale": np.full(3, 5.0)} if ema else None
    jax.tree.map(np.testing.assert_array_equal, found.ema, average)
    assert "not in the checkpoint, and as in a new model: mean, variance" in caplog.text


def test_parameters_that_the_model_does_not_have_are_refused():
    _, state = normed_state()
    with pytest.raises(UserError, match="the model has no parameter head/kernel; give"):
        state.with_variables(state.variables | {"head": {"kernel": jnp.ones(2)}})


EVERY_WRAPPER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.multi_transform(
        {
            "adam": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
            "factored": optax.adafactor(1e-3, min_dim_size_to_factor=2),
        },
        {"table": "adam", "kernel": "factored"},
    ),
)


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.lion(1e-3), EVERY_WRAPPER])
def test_statistics_of_any_optax_transformation_are_divided_as_their_parameters_are(optimizer):
    abstract = abstract_state(Small(), optimizer, 0, mesh_of(2, 2, 2))
    found = {(leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(abstract.opt_state)}
    expected = {
        (6, 8): PartitionSpec("tensor", "fsdp"),
        (8, 4): PartitionSpec("fsdp", "tensor"),
        (8,): PartitionSpec("fsdp"),
        (4,): PartitionSpec("tensor"),
        (1,): PartitionSpec(),
        (): PartitionSpec(),
    }
    assert {(shape, expected[shape]) for shape, _ in found} == found
    assert any(len(shape) == 2 or shape in ((8,), (4,)) for shape, _ in found)
