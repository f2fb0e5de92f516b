"""Reads directories in Hugging Face format: config.json and safetensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_transformers.errors import UserError
from flax_transformers.families import generation_settings, tensor_files
from flax_transformers.families.config_fields import kept_fields
from flax_transformers.families.family import Family, family_of_json
from flax_transformers.families.placement import Placement, boxed_shapes, fresh_heads
from flax_transformers.families.side_files import CONFIG
from flax_transformers.families.weights import known_names, read_parameters
from flax_transformers.models.config import Execution, TextConfig, TransformerConfig

PLAIN = Execution()


def find_directory(path: str | os.PathLike[str]) -> Path | None:
    """A directory at ``path``, or the newest snapshot of a Hugging Face id in the local cache.

    None if there is neither. Nothing is downloaded.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    parts = os.fspath(path).split("/")
    if len(parts) > 2 or not all(parts) or any(part in (".", "..") for part in parts):
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    entry = cache / "--".join(("models", *parts))
    reference = entry / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = entry / "snapshots" / reference.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def load_directory(
    directory: Path,
    *,
    architecture: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    execution: Execution = PLAIN,
    mesh: Mesh | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a Hugging Face directory and its parameters, of ``dtype``.

    Another ``architecture`` of the same family, or another ``num_labels``, takes the layers from
    the file and makes the heads that the file does not hold anew. One parameter at a time is on the
    host; with a ``mesh`` each goes where the sharding rules put it. Raises UserError for whatever
    is missing, extra, mis-shaped, damaged or unknown.
    """
    family, own, config = _read_config(directory, architecture, num_labels)
    tensors = tensor_files.open_tensors(directory)
    if family.settle is not None:
        own, config = family.settle(own, tensors), family.settle(config, tensors)
    platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
    model = config.build(execution.resolve(platform))
    place = Placement.of(model, dtype, mesh)
    ignored: frozenset[str] = frozenset()
    if config != own:  # what only its own heads need
        own_params = nn.meta.unbox(boxed_shapes(own.build(Execution())))
        ignored = known_names(family.weights(own), tensors, own_params)
    reading = read_parameters(
        family.weights(config),
        tensors,
        place.shapes,
        getattr(config, "vocab_size", 0),
        ignored=ignored,
        fresh_heads=config != own,
    )
    with _naming(directory):
        leaves = {path: place.put(path, value) for path, value in reading}
    params = unflatten_dict(leaves, sep="/")
    absent = set(place.shapes) - set(params)
    return model, params | fresh_heads(model, place, absent, directory, seed)


def _read_config(
    directory: Path, architecture: str | None, num_labels: int | None
) -> tuple[Family, TransformerConfig, TransformerConfig]:
    """The family, the config that the file describes, and the one that is asked for."""
    described = tensor_files.read_json(directory / CONFIG)
    with _naming(directory):
        try:
            family = family_of_json(described)
            own = family.from_huggingface(described)
            beside = _beside_the_model(directory, described, family, own)
            changed = dict(described)
            if architecture is not None:
                if architecture not in family.architectures:
                    raise UserError(
                        f"architecture {architecture!r} is not one of this family; choose among "
                        f"{', '.join(family.architectures)}"
                    )
                changed["architectures"] = [architecture]
            if num_labels is not None and num_labels != own.num_labels:
                changed |= {"id2label": None, "label2id": None, "num_labels": num_labels}
            config = replace(family.from_huggingface(changed), **beside)
            return family, replace(own, **beside), config
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise UserError(
                f"config.json has a field of a kind that cannot be read ({error}); compare it with "
                "that of a published model"
            ) from error


def _beside_the_model(
    directory: Path, described: Mapping[str, Any], family: Family, config: TransformerConfig
) -> dict[str, Any]:
    """The fields of a config that do not come from the family's part of config.json."""
    written = family.to_huggingface(config)
    fields: dict[str, Any] = {"hub_fields": kept_fields(described, written, family.aliases)}
    if isinstance(config, TextConfig):
        fields["generation"] = generation_settings.read_folder(directory, config, described)
    return fields


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Puts the directory before what is wrong with it."""
    try:
        yield
    except UserError as error:
        known = str(directory) in str(error)
        raise error if known else UserError(f"{directory}: {error}") from None
