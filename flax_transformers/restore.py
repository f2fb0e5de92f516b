"""Models from checkpoints, for ``evaluate``, ``fill-mask`` and ``load_pretrained``."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_transformers.adapters.lora import LoraConfig, base_of, merged
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.checkpointing.step_directories import SavedStep
from flax_transformers.config_json import current_names, from_json, to_json
from flax_transformers.data.tokenizers.load import Tokenizer, load_tokenizer, published_files
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import Placement, adapted_shapes
from flax_transformers.models.config import ComputeConfig, TextConfig, TransformerConfig
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.training.config import TrainConfig


@dataclass(frozen=True)
class RestoredModel:
    """A model from a checkpoint."""

    model_config: TransformerConfig
    model: nn.Module
    params: Any
    tokenizer: Tokenizer | None
    """None for a model that was not trained on text."""
    target_tokenizer: Tokenizer | None
    """The tokenizer of the targets, if they have their own."""
    mesh: Mesh
    step: int


def restore_model(
    path: str | os.PathLike[str] | SavedStep,
    mesh: Mesh | None = None,
    compute: ComputeConfig | None = None,
) -> RestoredModel:
    """Reads the parameters (not the optimizer), config and tokenizers of a checkpoint.

    The parameters are their average, if the run kept one.
    ``path`` is a workdir, its checkpoints folder or one step; the newest valid step counts. The
    ``compute`` is by default that of the run. Raises UserError for what is missing or damaged.
    """
    found = path if isinstance(path, SavedStep) else find_checkpoint(path)
    model_config = with_prompts_of(found, saved_model(found))
    if compute is None:
        compute = _saved_compute(found)
    mesh = mesh or make_mesh(MeshConfig())  # what is here, not what it was trained on
    model = build_model(model_config, compute.resolve(mesh.devices.flat[0].platform))
    tokenizer, target = saved_tokenizers(found)
    return RestoredModel(
        model_config=model_config,
        model=model,
        params=restore_model_params(found, model, mesh),
        tokenizer=tokenizer,
        target_tokenizer=target,
        mesh=mesh,
        step=found.meta["position"]["step"],
    )


def restore_model_params(found: SavedStep, model: nn.Module, mesh: Mesh | None) -> dict[str, Any]:
    """The float32 parameters of the ``model`` that a checkpoint holds, on the mesh or the first
    device; adapters are merged into them."""
    lora = saved_lora(found)
    boxed, adapters = adapted_shapes(model, lora)
    wanted = Placement.of_shapes(boxed, jnp.float32, mesh).shapes
    params = restore_params(found, wanted)
    if adapters is None:
        return params
    placed = jax.tree.map(lambda leaf: leaf.sharding, base_of(wanted))
    return jax.jit(lambda tree: merged(tree, lora.scale), out_shardings=placed)(params)


def saved_lora(found: SavedStep) -> LoraConfig:
    """The adapters of the run that saved a checkpoint."""
    return saved_part(found, "lora") or LoraConfig()


def saved_tokenizers(found: SavedStep) -> tuple[Tokenizer | None, Tokenizer | None]:
    """The tokenizer of a checkpoint, and that of its targets; None for what it does not have."""
    return _tokenizer(found, "tokenizer"), _tokenizer(found, "target_tokenizer")


def _tokenizer(found: SavedStep, name: str) -> Tokenizer | None:
    folder = found.folder / name
    if found.meta.get(name) is None and not _has_tokenizer(found, folder):
        return None
    return load_tokenizer(folder)


def _has_tokenizer(found: SavedStep, folder: Any) -> bool:
    """Whether converted weights are of text and have a tokenizer: of images, the files in its
    folder describe the preprocessing."""
    return isinstance(saved_model(found), TextConfig) and bool(published_files(folder))


def saved_config(found: SavedStep) -> TrainConfig | None:
    """That of the run which saved a checkpoint; None for weights that were converted.

    Raises UnregisteredType if the run used a type of the user's own that is not registered.
    """
    return from_json(found.meta["config"]) if "config" in found.meta else None


def saved_part(found: SavedStep, name: str) -> Any:
    """One field of the config of the run that saved a checkpoint; the rest is not read.

    None for weights that were converted. Raises UserError for a part that cannot be read here, such
    as a type of the user's own that is not registered.
    """
    return from_json(_described(found).get(name)) if "config" in found.meta else None


def saved_model(found: SavedStep) -> TransformerConfig:
    """The model of a checkpoint; the rest of the run's config is not read.

    Raises UserError if its meta describes none.
    """
    model = from_json(_described(found).get("model"))
    if not isinstance(model, TransformerConfig):
        raise UserError(f"{found.folder} is not a checkpoint of flax_transformers")
    return model


def with_prompts_of(found: SavedStep, model: TransformerConfig) -> TransformerConfig:
    """The model of a checkpoint with the setting of how its run's objective reads prompts."""
    objective = None
    with suppress(UserError):  # a type that is not registered here
        objective = saved_part(found, "objective")
    return with_prompts(model, objective)


def with_prompts(model: TransformerConfig, objective: Any) -> TransformerConfig:
    """The model with bidirectional prompts if the objective trains it with bidirectional prefixes
    (T5, arXiv:1910.10683 section 3.2.1)."""
    needs = getattr(objective, "needs", None)
    if not isinstance(model, TextConfig) or "prefix_mask" not in getattr(needs, "inputs", ()):
        return model
    return replace(model, generation=replace(model.generation, bidirectional_prompt=True))


def _saved_compute(found: SavedStep) -> ComputeConfig:
    compute = from_json(_described(found).get("compute"))
    return compute if isinstance(compute, ComputeConfig) else ComputeConfig(dtype="auto")


def _described(found: SavedStep) -> dict[str, Any]:
    """The JSON of the run's config; for converted weights, the meta of ``converted_meta``."""
    described = found.meta.get("config", found.meta)
    return current_names(TrainConfig, described) if isinstance(described, dict) else {}


def converted_meta(model: TransformerConfig) -> dict[str, Any]:
    """The meta of a checkpoint of converted weights."""
    return {"model": to_json(model), "position": {"step": 0}, "metrics": {}}
