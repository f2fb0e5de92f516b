"""What a step carries to the next, and where each part of it lies on the mesh."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from flax_transformers.parallel.rules import parameter_shardings, replicated


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint holds and a step renews.

    ``step`` counts steps taken, ``skipped`` those whose gradients were not finite and
    ``skipped_in_a_row`` the run of them that ends here (int32 scalars). ``rng`` is the raw data of
    the run's key (uint32 [2]); a step draws from ``fold_in(rng, step)``.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def new_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, sequence_length: int
) -> TrainState:
    """A fresh state with boxed parameters (they still carry their logical axis names)."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    ids_BT = jnp.zeros((1, sequence_length), jnp.int32)
    params = model.init(init_key, ids_BT)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(nn.meta.unbox(params)),
        rng=jax.random.key_data(run_key),
        skipped=zero,
        skipped_in_a_row=zero,
    )


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    sequence_length: int,
    mesh: Mesh,
) -> TrainState:
    """The shapes, dtypes and shardings of the state, without computing or allocating anything.

    Optimizer statistics lie where their parameters lie. Raises UserError if a parameter does not
    divide over the mesh.
    """
    boxed = jax.eval_shape(lambda: new_state(model, optimizer, seed, sequence_length))
    shardings = parameter_shardings(boxed.params, mesh)
    whole = replicated(mesh)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        boxed.opt_state,
        shardings,
        transform_non_params=lambda _: whole,
    )
    placed = boxed.replace(params=nn.meta.unbox(boxed.params))
    everywhere = jax.tree.map(lambda _: whole, placed).replace(
        params=shardings, opt_state=opt_shardings
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        placed,
        everywhere,
    )


def initialize_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    sequence_length: int,
    abstract: TrainState,
) -> TrainState:
    """A fresh state, each part computed where ``abstract`` says it lies.

    The numbers do not depend on the mesh, but for rounding in the last bit.
    """

    def init() -> TrainState:
        state = new_state(model, optimizer, seed, sequence_length)
        return state.replace(params=nn.meta.unbox(state.params))

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
