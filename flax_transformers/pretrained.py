"""Models in and out: Hugging Face directories and our own checkpoints, by one pair of functions."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_transformers.adapters.lora import Adapters, LoraConfig, base_of, merged
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.checkpointing.step_directories import (
    SavedStep,
    absolute,
    best_of_folder,
    finished_steps,
)
from flax_transformers.data.tokenizers import load as tokenizer_files
from flax_transformers.data.tokenizers.export import (
    export_folder,
    exported_files,
    warn_of_another_class,
)
from flax_transformers.data.tokenizers.kinds import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface import generation_settings, placement
from flax_transformers.huggingface import read as hub_read
from flax_transformers.huggingface import write as hub_write
from flax_transformers.huggingface.family import ONLY_IN_TRAINING, build_model, family_of
from flax_transformers.huggingface.folder_kinds import CONFIG
from flax_transformers.huggingface.peft import write_adapter
from flax_transformers.huggingface.weights import export_tensors, find_slots
from flax_transformers.models.config import (
    BESIDE_THE_MODEL,
    ComputeConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.models.generation_settings import NO_SETTINGS
from flax_transformers.models.vision import change_image_size
from flax_transformers.restore import (
    restore_model_params,
    saved_lora,
    saved_model,
    with_prompts_of,
)
from flax_transformers.storage.hub import is_path

log = logging.getLogger(__name__)

NEW_IN_A_RUN = frozenset(
    {"architecture", "num_labels", "label_names", "problem_type", "image_size"}
)
"""Fields of a model in which a run may differ from the weights it starts from: heads are new then,
and positions resized."""
_BEGIN_AND_END = frozenset({"bos_id", "eos_ids"})
"""Fields that do not change the outputs of the layers of a model that writes text."""


def load_pretrained(
    path: str | os.PathLike[str] | SavedStep,
    *,
    architecture: str | None = None,
    num_labels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    compute: ComputeConfig = hub_read.PLAIN,
    mesh: Mesh | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its parameters: ``model.apply({"params": params}, input_ids=ids)``.

    ``path`` is a directory in Hugging Face format (config.json and safetensors), a Hugging Face id
    ("gpt2", or "gpt2@REVISION"; taken from the local cache, or downloaded unless HF_HUB_OFFLINE is
    set), or a workdir or step folder of ours. ``architecture``, a
    Hugging Face class name, says what it is read as; without it the names in config.json do. Heads
    that it does not hold are newly initialised, and so are those whose size another ``num_labels``
    changes; a warning names them, and ``seed`` draws them. For another ``image_size`` (pixels, or
    height and width) positions of images are resized as the originals do, by bicubic interpolation.
    Parameters are of ``dtype``, on the first device or, with a ``mesh``, placed by the sharding
    rules one by one.

    Adapters, of a run or in PEFT's format beside their base, are merged into the weights.

    Raises UserError, naming it, for a tensor that is missing, extra or mis-shaped, an architecture
    or activation that is not supported, a file that is missing or damaged, and for folders of
    another kind (quantised weights, pickles), with what to do about them.
    """
    how: dict[str, Any] = {"architecture": architecture, "num_labels": num_labels}
    how |= {"seed": seed, "dtype": dtype, "compute": compute, "mesh": mesh}
    found = find_pretrained(path)
    if isinstance(found, SavedStep):
        model, params = _load_checkpoint(found, **how)
    else:
        model, params = hub_read.load_directory(found, **how)
    if image_size is None:
        return model, params
    if model.config.image_encoder is None:
        raise UserError(
            f"image_size is given, but {folder_of(found)} holds a {model.config.architecture}, "
            "which sees no images; leave it out"
        )
    return with_image_size(model, params, image_size)


def with_image_size(
    model: Any, params: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[nn.Module, dict[str, Any]]:
    """A model over images, or with an image encoder, and its parameters for another image size."""
    config = model.config
    if isinstance(config, VisionConfig):
        config, changed = change_image_size(config, params, image_size)
    else:
        vision, tower = change_image_size(config.vision, params["image_tower"], image_size)
        config = dataclasses.replace(config, vision=vision)
        changed = {**params, "image_tower": tower}
    return build_model(config, model.compute), changed


def find_pretrained(path: str | os.PathLike[str] | SavedStep) -> SavedStep | Path:
    """What ``load_pretrained`` reads: a verified checkpoint, or a directory in Hugging Face format.

    Raises UserError if there is neither.
    """
    if isinstance(path, SavedStep):
        return path
    if is_checkpoint(path):
        return find_checkpoint(path)
    if Path(path).is_file():
        raise UserError(f"{os.fspath(path)} is a file; give the folder that it is in")
    directory = hub_read.find_directory(path)
    if directory is None:
        raise UserError(
            f"there is no directory {os.fspath(path)}, and no model of that name {_sought(path)}"
        )
    return directory


def folder_of(found: SavedStep | Path) -> epath.Path | Path:
    """The folder of what ``find_pretrained`` returns."""
    return found.folder if isinstance(found, SavedStep) else found


def tokenizer_folders(found: SavedStep | Path) -> tuple[Any, Any]:
    """The folder of a model's tokenizer, and that of the targets if they have their own."""
    if not isinstance(found, SavedStep):
        return hub_read.tokenizer_folder(found), None
    target = found.folder / "target_tokenizer"
    return found.folder / "tokenizer", target if target.is_dir() else None


def _sought(path: str | os.PathLike[str]) -> str:
    """Where a model was sought that was not found, and what to do."""
    if is_path(os.fspath(path)):
        return f"was sought on the hub; check the path, or write {path}@main for the hub's model"
    return (
        "is in the local cache of Hugging Face or on its hub; give the path, or check the name "
        "(HF_HUB_OFFLINE turns downloads off)"
    )


def describe_pretrained(
    found: SavedStep | Path, architecture: str | None = None
) -> TransformerConfig:
    """The config of the model that ``load_pretrained`` gives; reads no weights."""
    if not isinstance(found, SavedStep):
        return hub_read.directory_config(found, architecture)
    config = with_prompts_of(found, _with_settings(saved_model(found), Path(found.folder)))
    if architecture is None:
        return config
    part = _part(config, architecture)
    return dataclasses.replace(config, architecture=architecture) if part is None else part[0]


def _part(config: TransformerConfig, architecture: str | None) -> Any:
    """As ``Family.part``; None for a family without."""
    select = family_of(config).part
    return None if architecture is None or select is None else select(config, architecture)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer beside a model: ``tokenizer(["a text"])`` gives ``input_ids`` and
    ``attention_mask``, int32 [B, T], and ``tokenizer.decode(ids)`` the text.

    ``path`` is what ``load_pretrained`` takes, or a tokenizer's own folder or file. Raises
    UserError for what is missing or damaged.
    """
    if is_checkpoint(path):
        return tokenizer_files.load_tokenizer(find_checkpoint(path).folder / "tokenizer")
    directory = None if Path(path).is_file() else hub_read.find_directory(path)
    folder = directory and hub_read.tokenizer_folder(directory)
    return tokenizer_files.load_tokenizer(folder or path)


def initial_model(
    path: str | os.PathLike[str],
    config: TransformerConfig,
    given: Collection[str] = (),
    *,
    resumes: bool = False,
) -> TransformerConfig:
    """The model of a run that starts from the weights in ``path``: described there, and by
    ``config`` only in its heads, its image size, what matters in training alone and the generation
    settings that it has.

    A new run that writes text also has the begin and end ids that are ``given``, and the end ids of
    a ``config`` that adds some to those of the weights, such as the end of a turn. Generation
    ends at them too. One that ``resumes`` keeps its own.

    A log line names the fields in which the two differ. Raises UserError if ``path`` holds another
    family, or contradicts one of the fields that the user has ``given`` on the command line. Reads
    configs and no weights.
    """
    place = f"--init-from {os.fspath(path)}"
    if is_checkpoint(path):
        found = saved_model(find_checkpoint(path))
    else:
        directory = hub_read.find_directory(path)
        if directory is None:
            raise UserError(f"{place} is no directory, and no model of that name {_sought(path)}")
        found = hub_read.initial_directory_config(directory, config.architecture)
    if config.architecture not in family_of(found).architectures:
        raise UserError(
            f"{place} holds a {found.architecture}, but the config's model is a "
            f"{config.architecture}; choose weights of that family, or make the config's model a "
            f"{type(found).__name__}"
        )
    ids = frozenset() if resumes else _begin_and_end_of_run(found, config, given)
    return _combined(found, config, given, place, ids)


def _begin_and_end_of_run(
    found: TransformerConfig, config: TransformerConfig, given: Collection[str]
) -> frozenset[str]:
    """The fields of begin and end ids that a new run has from ``config``."""
    if not generation_settings.writes_text(config):
        return frozenset()
    theirs, ours = (set(getattr(one, "eos_ids", ())) for one in (found, config))
    return _BEGIN_AND_END & {*given, *(["eos_ids"] if theirs and theirs < ours else [])}


def _combined(
    found: TransformerConfig,
    config: TransformerConfig,
    given: Collection[str],
    place: str,
    ids: frozenset[str],
) -> TransformerConfig:
    own = ONLY_IN_TRAINING | NEW_IN_A_RUN | ids
    names = [field.name for field in dataclasses.fields(config) if field.name not in own]
    theirs = {name: getattr(found, name) for name in names if hasattr(found, name)}
    _check_given(theirs, config, given, place)
    if isinstance(found, TextConfig):  # how prompts are read follows from the run's own objective
        theirs["generation"] = dataclasses.replace(found.generation, bidirectional_prompt=None)
    differ = [name for name in theirs if theirs[name] != getattr(config, name)]
    if shown := [name for name in differ if name not in BESIDE_THE_MODEL]:
        fields = ", ".join(f"{name} {theirs[name]!r}" for name in shown[:8])
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        log.info("the model is that of %s, not the config's: %s%s", place, fields, more)
    model: Any = dataclasses.replace(config, **theirs)
    other = {name for name in ids if getattr(model, name) != getattr(found, name)}
    if other:
        settings = generation_settings.with_begin_and_end(model.generation, model, other)
        model = dataclasses.replace(model, generation=settings)
    return _with_decoding(model, config, place)


def evaluated_model(
    found: TransformerConfig, config: TransformerConfig, given: Collection[str], place: str
) -> TransformerConfig:
    """The model ``found`` in ``place`` with the generation settings of ``config``, which a log line
    names.

    Raises UserError if it contradicts one of the other fields that the user has ``given`` on the
    command line, except for those that matter in training alone.
    """
    names = [field.name for field in dataclasses.fields(found)]
    theirs = {name: getattr(found, name) for name in names if name not in ONLY_IN_TRAINING}
    _check_given(theirs, config, given, place)
    return _with_decoding(found, config, place)


def _check_given(
    theirs: Mapping[str, Any], config: TransformerConfig, given: Collection[str], place: str
) -> None:
    """Raises UserError for a ``given`` field of ``config`` other than the generation settings that
    is not as in the weights."""
    for name in theirs:
        ours = getattr(config, name, None)
        if name in given and name != "generation" and ours != theirs[name]:
            option = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"{place} holds a model whose {name} is {theirs[name]!r}, but {option} asks for "
                f"{ours!r}; leave {option} out, or start from other weights"
            )


def _with_decoding(
    found: TransformerConfig, config: TransformerConfig, place: str
) -> TransformerConfig:
    """``found`` with the generation settings that ``config`` has, over its own."""
    ours = getattr(config, "generation", None)
    if not isinstance(found, TextConfig) or ours is None:
        return found
    theirs = found.generation
    changed = {
        field.name: value
        for field in dataclasses.fields(ours)
        if (value := getattr(ours, field.name)) not in (field.default, getattr(theirs, field.name))
    }
    if not changed:
        return found
    shown = ", ".join(f"{name} {value!r}" for name, value in changed.items())
    log.info("generation settings of the config over those of %s: %s", place, shown)
    return dataclasses.replace(found, generation=dataclasses.replace(theirs, **changed))


def _require_same(found: TransformerConfig, config: TransformerConfig, place: str) -> None:
    """Raises UserError, naming the field, if the models differ in more than training."""
    ignored = ONLY_IN_TRAINING | BESIDE_THE_MODEL | NEW_IN_A_RUN
    ignored |= _BEGIN_AND_END if generation_settings.writes_text(config) else frozenset()
    for field in dataclasses.fields(config):
        theirs, ours = (getattr(c, field.name, None) for c in (found, config))
        if theirs != ours and field.name not in ignored:
            option = field.name.replace("_", "-")
            raise UserError(
                f"{place} holds a model whose {field.name} is {theirs!r}, but model.{field.name} "
                f"is {ours!r}; set --model.{option} {theirs}, or the model in the config to the "
                "one that is there"
            )


def initial_parameters(
    path: str | os.PathLike[str], config: TransformerConfig, mesh: Mesh, seed: int
) -> dict[str, Any]:
    """What a run of ``config`` starts from: parameters as ``load_pretrained`` reads them.

    Heads that ``path`` does not hold are drawn by ``seed``. Raises UserError, naming the field, if
    it holds another model than ``config`` describes; what matters only in training may differ.
    """
    model, params = load_pretrained(
        path,
        architecture=config.architecture,
        num_labels=config.num_labels,
        image_size=config.image_size if isinstance(config, VisionConfig) else None,
        seed=seed,
        mesh=mesh,
    )
    _require_same(model.config, config, f"--init-from {os.fspath(path)}")
    _check_order_of_classes(model.config, config, os.fspath(path))
    log.info("starts from the weights of %s", os.fspath(path))
    return params


def _check_order_of_classes(found: TransformerConfig, wanted: TransformerConfig, path: str) -> None:
    """Raises UserError if a head that is taken over has the same classes in another order."""
    theirs, ours = found.label_names, wanted.label_names
    if theirs != ours and sorted(map(str.lower, theirs)) == sorted(map(str.lower, ours)):
        raise UserError(
            f"the head in {path} has its classes in the order {', '.join(theirs)}, the data in the "
            f"order {', '.join(ours)}; give the data source's label_names in the first order"
        )
    if theirs and ours and theirs != ours:
        log.warning(
            "the head in %s knows the classes %s, and is trained further for %s",
            path, ", ".join(theirs[:5]), ", ".join(ours[:5]),
        )  # fmt: skip


def save_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = hub_write.MAX_SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a new directory that transformers loads unchanged, tensors in the dtype of ``params``.

    Files of more than ``max_shard_bytes`` are divided. ``tokenizer`` is written as transformers
    reads it. ``tokenizer_from``, in its place, is a folder whose tokenizer and preprocessor files
    are copied, with the image size of the model; a tokenizer that a run saved is written as
    transformers reads it. The directory appears when it is complete. Raises UserError if it holds
    files already or cannot be written, or if the Hugging Face class cannot be what the model's
    config says.
    """
    config: Any = model.config
    limit, types = getattr(config, "max_positions", None), getattr(config, "token_types", 0)
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer is not None:
            files = exported_files(tokenizer, tokenizer.frame, limit, types)
            for name, content in files.items():
                (Path(scratch) / name).write_bytes(content)
            tokenizer_from = scratch
        elif tokenizer_from is not None:
            exported = Path(scratch) / "exported"
            tokenizer_from = export_folder(Path(tokenizer_from), exported, limit, types)
        warn_of_another_class(tokenizer_from, family_of(config).model_type(config.architecture))
        hub_write.save_directory(
            directory, model, params, max_shard_bytes=max_shard_bytes, tokenizer_from=tokenizer_from
        )


def save_adapter(
    directory: str | os.PathLike[str], run: str | os.PathLike[str], base: str | os.PathLike[str]
) -> None:
    """Writes the adapters of a run with ``lora.rank`` to a new directory, as PEFT reads them.

    ``base``: the model that they belong to, a folder in Hugging Face format or an id; PEFT finds it
    by this name. Where it is at hand, its weights are compared with those in the run. Raises
    UserError for a run without adapters, another base, and kernels that have no linear layer in
    the Hugging Face class.
    """
    found = find_pretrained(run)
    lora = saved_lora(found) if isinstance(found, SavedStep) else LoraConfig()
    if not isinstance(found, SavedStep) or not lora.is_on:
        raise UserError(f"{os.fspath(run)} is no run with adapters; give one with lora.rank")
    model: Any = build_model(describe_pretrained(found))
    boxed, adapters = placement.adapted_shapes(model, lora)
    assert adapters is not None
    params = restore_params(found)
    there = hub_read.find_directory(base)
    if there is None:
        log.warning("%s is not here: its weights are not compared with the run's", base)
    else:
        _require_base(model.config, base_of(params), there, adapters)
    own = os.path.abspath(os.path.expanduser(base))
    name = os.fspath(base) if there is None or not os.path.isdir(own) else own
    with hub_write.appearing(Path(os.path.abspath(os.path.expanduser(directory)))) as folder:
        write_adapter(folder, name, model.config, boxed, adapters, params)


def _require_base(config: Any, params: Mapping[str, Any], base: Path, adapters: Adapters) -> None:
    """Raises UserError, naming a tensor, if the parameters that a run did not train are not those
    of the model in ``base``."""
    _, theirs = load_pretrained(
        base, architecture=config.architecture, num_labels=config.num_labels
    )
    table, vocab_size = family_of(config).weights(config), getattr(config, "vocab_size", 0)
    trained = {"/".join(name) for name in adapters.fully_trained}
    slots = find_slots(table, theirs)
    both = zip(*(export_tensors(table, tree, vocab_size) for tree in (params, theirs)), strict=True)
    for (name, ours), (_, other) in both:
        if trained.isdisjoint(slots[name].paths) and not np.array_equal(ours, other):
            raise UserError(
                f"the run has another {name} than {base}, and did not train it; give the model "
                "that the run started from"
            )


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a workdir, a folder of checkpoints or one step, as training writes,
    "best" among them."""
    try:
        folder = absolute(path)
        inner = any((folder / name).is_dir() for name in ("checkpoints", "state"))
        steps = best_of_folder(folder) or folder
        # Beside a config.json, folders named by numbers are no steps of a run.
        return inner or (bool(finished_steps(steps)) and not (steps / CONFIG).exists())
    except (OSError, ImportError, KeyError):
        return False


def _with_settings(config: TransformerConfig, folder: Path) -> TransformerConfig:
    """The config with the generation settings that checkpoints of earlier versions keep beside
    their tokenizer."""
    beside = folder / "tokenizer"
    if not isinstance(config, TextConfig) or config.generation != NO_SETTINGS:
        return config
    if not (beside / generation_settings.FILE).is_file():
        return config
    settings = generation_settings.read_folder(beside, config)
    settings = generation_settings.with_ids(settings, config)
    return dataclasses.replace(config, generation=settings)


def _load_checkpoint(
    found: SavedStep,
    *,
    architecture: str | None,
    num_labels: int | None,
    seed: int,
    dtype: DTypeLike,
    compute: ComputeConfig,
    mesh: Mesh | None,
) -> tuple[nn.Module, dict[str, Any]]:
    own = describe_pretrained(found)
    part = _part(own, architecture)
    own = own if part is None else part[0]
    changes: dict[str, Any] = {"architecture": architecture or own.architecture}
    if num_labels is not None and num_labels != own.num_labels:
        changes |= {"num_labels": num_labels, "label_names": ()}
    config = dataclasses.replace(own, **changes)
    platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
    model = build_model(config, compute.resolve(platform))
    place = placement.Placement.of(model, dtype, mesh)
    if config == own and part is None:
        params = restore_model_params(found, model, mesh)
        return model, jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    there = merged(restore_params(found), saved_lora(found).scale)
    there = there if part is None else part[1](there)
    saved, wanted = (flatten_dict(tree, sep="/") for tree in (there, place.shapes))
    unlike = [
        name for name in wanted if name not in saved or saved[name].shape != wanted[name].shape
    ]
    fresh = {name.partition("/")[0] for name in unlike}
    if fresh & placement.body_names(model):
        raise UserError(
            f"checkpoint {found.folder} holds no {unlike[0]} for {config.architecture}; choose an "
            f"architecture that shares its layers with {own.architecture}"
        )
    leaves = {
        name: place.put(name, np.asarray(saved.pop(name)).astype(dtype))
        for name in wanted
        if name.partition("/")[0] not in fresh
    }
    params = unflatten_dict(leaves, sep="/")
    return model, params | placement.fresh_heads(model, place, fresh, found.folder, seed)
