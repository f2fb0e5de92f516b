"""Write directories in Hugging Face format: config.json, safetensors and side files."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformers.errors import UserError
from flax_transformers.huggingface import generation_settings, tensor_files
from flax_transformers.huggingface.family import config_json, family_of, within_vocabulary
from flax_transformers.huggingface.folder_kinds import CONFIG, carried_files
from flax_transformers.huggingface.placement import boxed_shapes
from flax_transformers.huggingface.preprocessing import resized_files
from flax_transformers.huggingface.sentence_transformers import (
    carried_modules,
    sentence_files,
    sentence_limit,
)
from flax_transformers.huggingface.tensor_files import TensorInfo
from flax_transformers.huggingface.weights import export_tensors, tensor_dtypes, tensor_shapes
from flax_transformers.models.config import TransformerConfig
from flax_transformers.storage.locks import has_ended, process_tag

MAX_SHARD_BYTES = 5 * 10**9


def save_directory(
    directory: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_from: str | os.PathLike[str] | None = None,
    files: Mapping[str, Mapping[str, Any] | str] = MappingProxyType({}),
) -> None:
    """Write a directory that transformers loads: config.json, weights, generation settings, and
    ``files_to_carry``.

    ``tokenizer_from`` is a folder to copy those from, with the model's image size; ``files`` are
    further files by name, JSON or text, which replace copied ones; the fields of a config.json
    among them replace the model's. The files are written to a temporary folder that is renamed to
    ``directory`` at the end, with one tensor at a time on the host.
    Raises UserError if the directory has files or cannot be written, or if the Hugging Face class
    does not support the config.
    """
    config = within_vocabulary(_config(model))
    family = family_of(config)
    described, given = config_json(config), files.get(CONFIG)
    described |= given if isinstance(given, Mapping) else {}
    settings = generation_settings.settings_json(config, tokenizer_from)
    params = nn.meta.unbox(params)
    _require_complete(model, params)
    table, vocab_size = family.weights(config), getattr(config, "vocab_size", 0)
    dtypes = tensor_dtypes(table, params)
    described["dtype"] = str(next(iter(dtypes.values())))
    if "torch_dtype" in described:  # the older name
        described["torch_dtype"] = described["dtype"]
    shapes = tensor_shapes(table, params, vocab_size)
    tensors = [TensorInfo(name, dtypes[name], shape) for name, shape in shapes.items()]
    shards = tensor_files.plan_shards(tensors, max_shard_bytes)
    if jax.process_index() != 0:
        return
    with appearing(Path(os.path.abspath(Path(directory).expanduser()))) as folder:
        for name, shard in shards.items():
            names = [tensor.name for tensor in shard]
            values = export_tensors(table, params, vocab_size, names)
            tensor_files.write_file(folder / name, shard, _finite(values))
        if len(shards) > 1:
            tensor_files.write_shard_index(folder, shards)
        carried = files_to_carry(tokenizer_from, config)
        for name, file in carried.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        beside = {**sentence_files(config), **sentence_limit(config, carried)}
        beside |= {**resized_files(carried, config), **files}
        for name, content in beside.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                (folder / name).write_text(content, "utf-8")
            else:
                _write_json(folder / name, content)
        if settings is not None:
            _write_json(folder / generation_settings.FILE, settings)
        _write_json(folder / CONFIG, described)


def files_to_carry(
    directory: str | os.PathLike[str] | None, config: TransformerConfig
) -> dict[str, Path]:
    """The files beside a model that are copied as they are, by name."""
    return {**carried_files(directory), **carried_modules(directory, config)}


def _finite(values: Iterable[tuple[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """The tensors without their names. Raises UserError for values that are not finite, such as
    numbers beyond 65,504 in float16."""
    for name, value in values:
        if not np.isfinite(value).all():
            raise UserError(
                f"the tensor {name} has values that are not finite, or that {value.dtype} cannot "
                "hold; write it with --dtype float32, or choose a step before the run diverged"
            )
        yield value


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def published_parameters(model: nn.Module) -> int:
    """The published number of parameters, without padding of the vocabulary."""
    config = _config(model)
    shapes = tensor_shapes(
        family_of(config).weights(config),
        nn.meta.unbox(boxed_shapes(model)),
        getattr(config, "vocab_size", 0),
    )
    return sum(math.prod(shape) for shape in shapes.values())


def require_new(directory: Path) -> None:
    """Raise UserError if ``directory`` exists and is not an empty folder."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already holds files; choose a new directory")


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``directory`` when all is written."""
    require_new(directory)
    _remove_abandoned(directory)
    temporary = directory.with_name(f".{directory.name}.{process_tag()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(directory)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}); free some space there or "
            "choose another directory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Remove temporary folders of processes that were killed while writing ``directory``."""
    for folder in directory.parent.glob(f".{glob.escape(directory.name)}.*.tmp"):
        if has_ended(folder.name.split(".")[-2]):
            shutil.rmtree(folder, ignore_errors=True)


def _require_complete(model: nn.Module, params: Mapping[str, Any]) -> None:
    wanted = flatten_dict(nn.meta.unbox(boxed_shapes(model)), sep="/")
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


def _config(model: Any) -> TransformerConfig:
    return model.config
