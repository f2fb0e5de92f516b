"""Directories in Hugging Face format: config.json, safetensors and the files of a tokenizer."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_transformers.errors import UserError
from flax_transformers.families import tensor_files
from flax_transformers.families.family import Family, config_json, family_of, family_of_json
from flax_transformers.families.tensor_files import TensorInfo
from flax_transformers.families.weights import (
    export_tensors,
    known_names,
    read_parameters,
    tensor_dtypes,
    tensor_shapes,
)
from flax_transformers.models.config import Execution, TransformerConfig
from flax_transformers.parallel.rules import parameter_shardings

logger = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9
PLAIN = Execution()

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "source.spm", "target.spm", "target_vocab.json", "chat_template.jinja",
    GENERATION, "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files that belong to a model beside its weights; they are copied as they are."""


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
        own_params = nn.meta.unbox(_boxed(own.build(Execution())))
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
            return family, own, family.from_huggingface(changed)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise UserError(
                f"config.json has a field of a kind that cannot be read ({error}); compare it with "
                "that of a published model"
            ) from error


@dataclass(frozen=True)
class Placement:
    """Shapes, dtype and places of a model's parameters."""

    shapes: dict[str, Any]
    """Nested ``jax.ShapeDtypeStruct``, with shardings if they go onto a mesh."""

    @staticmethod
    def of(model: nn.Module, dtype: DTypeLike, mesh: Mesh | None) -> Placement:
        boxed = _boxed(model)
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
        """A parameter where it belongs; returns once nothing of ``value`` is needed any more."""
        leaf: Any = self.shapes
        for key in path.split("/"):
            leaf = leaf[key]
        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
        return array.block_until_ready()


def fresh_heads(
    model: nn.Module, place: Placement, names: Collection[str], source: object, seed: int = 0
) -> dict[str, Any]:
    """Newly initialised parameters of the heads ``names``; a warning says which they are."""
    if not names:
        return {}
    logger.warning("%s holds no weights for %s: started anew", source, ", ".join(sorted(names)))

    def initialise(key: jax.Array) -> Any:
        params = nn.meta.unbox(_initialise(model, key))
        return jax.tree.map(
            lambda leaf, wanted: leaf.astype(wanted.dtype),
            {name: params[name] for name in names},
            wanted,
        )

    wanted = {name: place.shapes[name] for name in names}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    # Compiled, so that nothing but the heads is ever computed.
    return jax.jit(initialise, out_shardings=shardings)(jax.random.key(seed))


def save_directory(
    directory: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes what transformers loads unchanged: config.json, weights, and CARRIED files.

    ``tokenizer_from`` is a folder to copy those from. All is written beside ``directory``, which
    appears in one go, and one tensor at a time is on the host. Raises UserError if the directory
    holds files already or cannot be written, or if the family cannot be what the config says.
    """
    config = _config(model)
    family = family_of(config)
    described = config_json(config)
    params = nn.meta.unbox(params)
    _require_complete(model, params)
    table, vocab_size = family.weights(config), getattr(config, "vocab_size", 0)
    dtypes = tensor_dtypes(table, params)
    described["dtype"] = str(next(iter(dtypes.values())))
    shapes = tensor_shapes(table, params, vocab_size)
    tensors = [TensorInfo(name, dtypes[name], shape) for name, shape in shapes.items()]
    shards = tensor_files.plan_shards(tensors, max_shard_bytes)
    if jax.process_index() != 0:
        return
    with _appearing(Path(os.path.abspath(Path(directory).expanduser()))) as folder:
        for name, shard in shards.items():
            names = [tensor.name for tensor in shard]
            values = export_tensors(table, params, vocab_size, names)
            tensor_files.write_file(folder / name, shard, (value for _, value in values))
        if len(shards) > 1:
            tensor_files.write_index(folder, shards)
        for name, file in carried_files(tokenizer_from).items():
            shutil.copyfile(file, folder / name)
        if settings := generation_settings(tokenizer_from):
            (folder / GENERATION).write_text(json.dumps(settings) + "\n", "utf-8")
        text = json.dumps(described, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, "utf-8")


def carried_files(directory: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Those of the CARRIED files that are in a directory, by name."""
    if directory is None:
        return {}
    files = {name: Path(directory) / name for name in CARRIED}
    return {name: file for name, file in files.items() if file.is_file()}


def generation_settings(directory: str | os.PathLike[str] | None) -> dict[str, Any]:
    """What older files say of writing in config.json alone, which is not carried along."""
    if directory is None or (Path(directory) / GENERATION).is_file():
        return {}
    file = Path(directory) / CONFIG
    described = tensor_files.read_json(file) if file.is_file() else {}
    forced = described.get("forced_bos_token_id")
    return {} if forced is None else {"forced_bos_token_id": forced}


def published_parameters(model: nn.Module) -> int:
    """The number of parameters as it is published: without padding of the vocabulary."""
    config = _config(model)
    shapes = tensor_shapes(
        family_of(config).weights(config),
        nn.meta.unbox(_boxed(model)),
        getattr(config, "vocab_size", 0),
    )
    return sum(math.prod(shape) for shape in shapes.values())


def require_new(directory: Path) -> None:
    """Raises UserError if there is something at ``directory`` already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already holds files; choose a new directory")


@contextlib.contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name when all is written."""
    require_new(directory)
    _remove_abandoned(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(directory)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}); make room there or choose "
            "another directory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Removes what processes left beside ``directory`` that were killed as they wrote it."""
    for folder in directory.parent.glob(f".{glob.escape(directory.name)}.*.tmp"):
        process = folder.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # which does nothing to it
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Puts the directory before what is wrong with it."""
    try:
        yield
    except UserError as error:
        known = str(directory) in str(error)
        raise error if known else UserError(f"{directory}: {error}") from None


def _require_complete(model: nn.Module, params: Mapping[str, Any]) -> None:
    wanted = flatten_dict(nn.meta.unbox(_boxed(model)), sep="/")
    given = flatten_dict(params, sep="/")
    for path in sorted(wanted.keys() | given.keys()):
        shapes = [tree[path].shape if path in tree else None for tree in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"params has {path} as {shapes[0]}, but the model as {shapes[1]}; give the params "
                "that belong to the model"
            )
        if not getattr(given[path], "is_fully_addressable", True):
            raise UserError(
                f"{path} is spread over several processes; write a checkpoint, and convert it in "
                "one process"
            )


def _boxed(model: nn.Module) -> Any:
    """Shapes of the parameters with their logical axis names."""
    return jax.eval_shape(partial(_initialise, model), jax.random.key(0))


def _initialise(model: Any, key: jax.Array) -> Any:
    return model.init(key, **model.example_inputs())["params"]


def _config(model: Any) -> TransformerConfig:
    return model.config
