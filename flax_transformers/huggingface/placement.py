"""Shapes, placement and initial values of the parameters of a model that is read from files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_transformers.adapters.lora import Adapters, LoraConfig, find_adapters
from flax_transformers.parallel.rules import parameter_shardings

log = logging.getLogger(__name__)


def boxed_shapes(model: nn.Module) -> Any:
    """Shapes of the parameters with their logical axis names."""
    return jax.eval_shape(_once(_initialise, model), jax.random.key(0))


def boxed_parameters(model: nn.Module, key: jax.Array) -> Any:
    """New parameters with their logical axis names."""
    return _once(_initialise, model)(key)


def adapted_shapes(model: nn.Module, lora: LoraConfig) -> tuple[Any, Adapters | None]:
    """As ``boxed_shapes``, with those of the adapters; and the adapters, None if there are none.

    Raises UserError for a layer or parameter named in ``lora`` that the model does not have.
    """
    boxed = boxed_shapes(model)
    if not lora.is_on:
        return boxed, None
    adapters = find_adapters(lora, boxed, body_names(model))
    return jax.eval_shape(adapters.added, boxed, jax.random.key(0)), adapters


def body_names(model: Any) -> frozenset[str]:
    """Top-level names of the parameters that ``hidden_states`` uses. All others belong to heads."""
    return frozenset(jax.eval_shape(_once(_initialise_body, model), jax.random.key(0)))


def names_of_logits(model: Any) -> frozenset[str]:
    """Top-level names of the parameters that a language model's logits depend on."""
    return frozenset(jax.eval_shape(_once(_initialise_logits, model), jax.random.key(0)))


def base_keeps_logits(adapters: Adapters | None, model: Any) -> bool:
    """Whether the logits of a language model without its adapters stay the same in training."""
    if adapters is None:
        return False
    return names_of_logits(model).isdisjoint(name[0] for name in adapters.fully_trained)


def _once(initialise: Callable[[Any, jax.Array], Any], model: Any) -> Callable[[jax.Array], Any]:
    """``initialise`` of ``model``, as a function that is traced once for equal models."""
    try:
        hash(model)
    except TypeError:  # a user's model whose config is a plain dataclass, say
        return partial(initialise, model)
    return partial(jax.jit(initialise, static_argnums=0), model)


def _initialise(model: Any, key: jax.Array) -> Any:
    return model.init(key, **model.example_inputs())["params"]


def _initialise_body(model: Any, key: jax.Array) -> Any:
    return model.init(key, **model.example_inputs(), method="hidden_states")["params"]


def _initialise_logits(model: Any, key: jax.Array) -> Any:
    def logits(model: Any, **inputs: Any) -> Any:
        return model.unembedding(model.hidden_states(**inputs).last_hidden_state)

    return model.init(key, **model.example_inputs(), method=logits)["params"]


@dataclass(frozen=True)
class Placement:
    """Shapes, dtype and shardings of a model's parameters."""

    shapes: dict[str, Any]
    """Nested ``jax.ShapeDtypeStruct``, with shardings if they go onto a mesh."""

    @staticmethod
    def of(model: nn.Module, dtype: DTypeLike, mesh: Mesh | None) -> Placement:
        return Placement.of_shapes(boxed_shapes(model), dtype, mesh)

    @staticmethod
    def of_shapes(boxed: Any, dtype: DTypeLike, mesh: Mesh | None) -> Placement:
        """``boxed``: shapes with logical axes; ``mesh``: None for the first device."""
        shapes = nn.meta.unbox(boxed)
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: device, shapes)
        else:
            shardings = parameter_shardings(boxed, mesh)
        return Placement(
            jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
                shapes,
                shardings,
            )
        )

    def put(self, path: str, value: np.ndarray) -> jax.Array:
        """Put a parameter onto its devices; returns when ``value`` is no longer needed."""
        leaf: Any = self.shapes
        for key in path.split("/"):
            leaf = leaf[key]
        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
        return array.block_until_ready()


def fresh_heads(
    model: nn.Module, place: Placement, names: Collection[str], source: object, seed: int = 0
) -> dict[str, Any]:
    """Newly initialised parameters of the heads ``names``; a warning names them."""
    if not names:
        return {}
    log.warning("%s holds no weights for %s: newly initialised", source, ", ".join(sorted(names)))

    def initialise(key: jax.Array) -> Any:
        params = nn.meta.unbox(boxed_parameters(model, key))
        return jax.tree.map(
            lambda leaf, wanted: leaf.astype(wanted.dtype),
            {name: params[name] for name in names},
            wanted,
        )

    wanted = {name: place.shapes[name] for name in names}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    # Compiled, so that only the heads are computed.
    return jax.jit(initialise, out_shardings=shardings)(jax.random.key(seed))
