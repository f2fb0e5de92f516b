"""From a checkpoint back to a model: what ``evaluate`` and ``fill-mask`` start from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_transformers.data.tokenizers import Tokenizer, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import parameter_shardings
from flax_transformers.training.checkpoints import find_checkpoint, restore_params
from flax_transformers.training.config import TrainConfig, from_json


@dataclass(frozen=True)
class Restored:
    """A model as a checkpoint left it."""

    config: TrainConfig
    model: nn.Module
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh
    step: int


def restore_model(path: str | os.PathLike[str], mesh: Mesh | None = None) -> Restored:
    """Reads the parameters (not the optimizer), config and tokenizer of a checkpoint.

    ``path`` is a workdir, its checkpoints folder or one step; the newest valid step counts.
    Raises UserError for what is missing or damaged.
    """
    found = find_checkpoint(path)
    meta, folder = found.meta, found.folder
    config = from_json(meta.get("config"))
    if not isinstance(config, TrainConfig):
        raise UserError(f"{folder} is not a training checkpoint of flax_transformers")
    mesh = mesh or make_mesh(MeshConfig())  # what is here, not what it was trained on
    model = config.model.build(config.execution.resolve(mesh.devices.flat[0].platform))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    shardings = parameter_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )
    return Restored(
        config=config,
        model=model,
        params=restore_params(found, abstract),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        mesh=mesh,
        step=meta["position"]["step"],
    )
