"""The training state, and its shardings."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_transformers.adapters.lora import Adapters
from flax_transformers.checkpointing.step_directories import few
from flax_transformers.errors import UserError
from flax_transformers.huggingface.placement import boxed_parameters
from flax_transformers.optim.selection import joined, name_of, split_statistics
from flax_transformers.parallel.rules import parameter_shardings, replicated

log = logging.getLogger(__name__)


class TrainState(struct.PyTreeNode):
    """Everything that a step updates and the arrays of a checkpoint hold.

    ``step`` counts steps taken, ``skipped`` those whose gradients were not finite, or a spike, and
    ``consecutive_skips`` those since the last update (int32 scalars). ``norm_mean`` is the recent
    mean of the gradient norm (float32 scalar; see ``optim.spike_detection``). ``params`` are those
    of the model and, where there are any, its adapters (``adapters.lora``). ``rng`` is the raw
    data of the run's key (uint32 [2]); a step draws from ``fold_in(rng, step)``. ``model_state``
    has the running statistics of the model, which steps move without an optimizer; it is None if
    there are none. ``ema`` is the average of ``variables``, or None if none is kept. A field with a
    default is optional in a checkpoint.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    skipped: jax.Array
    consecutive_skips: jax.Array = struct.field(metadata={"saved_as": "skipped_in_a_row"})
    ema: Any = None
    norm_mean: Any = np.float32(0)  # a Python float would be compiled for apart
    model_state: Any = None

    @property
    def variables(self) -> Any:
        """Parameters and running statistics, in one tree as the model reads them."""
        return joined(self.params, self.model_state)

    @property
    def evaluation_params(self) -> Any:
        """The variables to evaluate: their average if one is kept."""
        return self.variables if self.ema is None else self.ema

    def completed(self, abstract: TrainState, model: nn.Module) -> TrainState:
        """This restored state with a fresh value for each field that its checkpoint lacked.

        An average starts from the parameters, running statistics as those of a new ``model``,
        anything else from zero.
        """
        names = [field.name for field in dataclasses.fields(self)]
        wanted = {name: getattr(abstract, name) for name in names if getattr(self, name) is None}
        lacking = ["/".join(name) for name in flatten_dict(wanted.get("model_state") or {})]
        if lacking:
            log.warning("not in the checkpoint, and as in a new model: %s", few(lacking))

        def fresh(variables: Any) -> dict[str, Any]:
            values = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted)
            if lacking:
                boxed = boxed_parameters(model, jax.random.key(0))
                values["model_state"] = nn.meta.unbox(split_statistics(boxed)[1])
                variables = joined(variables, values["model_state"])
            if values.get("ema"):
                values["ema"] = jax.tree.map(jnp.copy, variables)
            return values

        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        return self.replace(**jax.jit(fresh, out_shardings=shardings)(self.variables))

    def with_variables(self, params: Any) -> TrainState:
        """This state with other variables of the model, and an average that starts from them;
        adapters stay as they are. Raises UserError for a name that the model does not have."""
        given = flatten_dict(params)
        unknown = sorted("/".join(n) for n in given.keys() - flatten_dict(self.variables).keys())
        if unknown:
            raise UserError(
                f"the model has no parameter {few(unknown)}; give parameters of this model, as "
                "load_pretrained returns them"
            )

        def renewed(tree: Any) -> Any:
            own = flatten_dict(tree, keep_empty_nodes=True)
            return unflatten_dict({name: given.get(name, leaf) for name, leaf in own.items()})

        statistics = None if self.model_state is None else renewed(self.model_state)
        state = self.replace(params=renewed(self.params), model_state=statistics)
        average = None if self.ema is None else jax.tree.map(jnp.copy, state.variables)
        return state.replace(ema=average)

    def starting_from(self, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """A fresh state of ``with_variables``. The optimizer state of this one is deleted."""
        state = self.with_variables(params)
        # Some optimizers keep copies of the parameters, such as those of schedule-free training.
        begin = jax.jit(
            lambda params, _: optimizer.init(params),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.opt_state),
            donate_argnums=1,
            keep_unused=True,
        )
        return state.replace(opt_state=begin(state.params, self.opt_state))


def new_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    ema: bool = False,
    adapters: Adapters | None = None,
) -> TrainState:
    """A fresh state with boxed parameters (they still carry their logical axis names).

    Raises UserError if the optimizer's patterns do not fit the parameters.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = boxed_parameters(model, init_key)
    if adapters is not None:
        params = adapters.added(params, init_key)
    variables = nn.meta.unbox(params)
    params, statistics = split_statistics(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(nn.meta.unbox(params)),
        rng=jax.random.key_data(run_key),
        skipped=zero,
        consecutive_skips=zero,
        ema=variables if ema else None,
        norm_mean=jnp.zeros((), jnp.float32),
        model_state=statistics,
    )


def _unboxed(state: TrainState) -> TrainState:
    params, statistics = nn.meta.unbox((state.params, state.model_state))
    return state.replace(params=params, model_state=statistics)


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    ema: bool = False,
    adapters: Adapters | None = None,
) -> TrainState:
    """The shapes, dtypes and shardings of the state, without computing or allocating anything.

    Optimizer statistics are sharded like their parameters; those that keep some axes of a parameter
    like these axes. Raises UserError if a parameter does not divide over the mesh,
    or as ``new_state`` does.
    """
    boxed = jax.eval_shape(lambda: new_state(model, optimizer, seed, ema=ema, adapters=adapters))
    shardings = parameter_shardings(boxed.params, mesh)
    of_statistics = parameter_shardings(boxed.model_state, mesh)
    whole = replicated(mesh)
    placed = _unboxed(boxed)
    everywhere = jax.tree.map(lambda _: whole, placed).replace(
        params=shardings,
        opt_state=_statistic_shardings(placed.opt_state, placed.params, shardings, whole),
        ema=joined(shardings, of_statistics) if ema else None,
        model_state=of_statistics,
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        placed,
        everywhere,
    )


def _statistic_shardings(opt_state: Any, params: Any, shardings: Any, whole: NamedSharding) -> Any:
    """A sharding for each array of the optimizer's state, of any optax transformation.

    A statistic belongs to the parameter whose name its path ends with. It has the parameter's
    sharding, or that of the parameter's axes which it keeps. ``whole`` is the sharding of all other
    arrays.
    """
    placed = {
        name_of(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def shard(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = name_of(path)
        endings = (name[start:] for start in range(len(name)))
        owner = next((ending for ending in endings if ending in placed), None)
        if owner is None:
            return whole
        shape, spec = placed[owner]
        axes = iter(itertools.zip_longest(shape, spec))
        kept = [next((axis for size, axis in axes if size == own), "?") for own in leaf.shape]
        return whole if "?" in kept else NamedSharding(whole.mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(shard, opt_state)


def initialize_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    abstract: TrainState,
    adapters: Adapters | None = None,
) -> TrainState:
    """A fresh state, computed with the shardings of ``abstract``.

    Its values do not depend on the mesh, except for rounding in the last bit.
    """

    def init() -> TrainState:
        ema = abstract.ema is not None
        state = new_state(model, optimizer, seed, ema=ema, adapters=adapters)
        return _unboxed(state)

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
