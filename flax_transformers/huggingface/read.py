"""Reads directories in Hugging Face format: config.json and safetensors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flax_transformers.errors import UserError
from flax_transformers.huggingface import (
    folder_kinds,
    generation_settings,
    peft,
    tensor_files,
)
from flax_transformers.huggingface.family import (
    Identity,
    build_model,
    identify,
    may_be_read_as,
)
from flax_transformers.huggingface.fields import kept_fields
from flax_transformers.huggingface.placement import Placement, body_names, boxed_shapes, fresh_heads
from flax_transformers.huggingface.sentence_transformers import (
    MODULES,
    lacks_pooling,
    read_sentence_files,
)
from flax_transformers.huggingface.weights import (
    head_names,
    known_names,
    read_parameters,
    require_sizes,
    some,
    unwrapped,
)
from flax_transformers.models.config import ComputeConfig, TextConfig, TransformerConfig
from flax_transformers.storage.hub import (
    BESIDE_WEIGHTS,
    Repository,
    is_offline,
    may_have,
    record_absence,
)
from flax_transformers.storage.paths import is_there

log = logging.getLogger(__name__)

PLAIN = ComputeConfig()
_OPTIONAL = (MODULES, "tokenizer_config.json")
"""Where these are there, or recorded as absent, sentence files and tokenizer were asked for."""
_SHARD = re.compile(r"(?!consolidated|adapter_model)[\w-]+-\d+-of-\d+\.safetensors")
"""Not a variant, which has another ending before the last, and not of another layout."""
_PART = re.compile(r"(?P<stem>.+)-\d+-of-(?P<total>\d+)\..+")


def find_directory(path: str | os.PathLike[str]) -> Path | None:
    """A directory at ``path``, or the snapshot of a Hugging Face id: "gpt2", or with a branch, tag
    or commit "gpt2@REVISION".

    A snapshot in the local cache is taken as it is if it has all weights and, where the repository
    has them, a tokenizer and the files of sentence embeddings; else it is completed, unless the
    environment forbids downloads. None if there is neither. Config, weights and tokenizer are in
    the ``folder_kinds.inner_folder`` of it. Raises UserError if weights are missing and the hub
    cannot be reached, or refuses.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    repository = Repository.of_id(os.fspath(path))
    if repository is None:
        return None
    cached = repository.cached()
    if cached is None:
        found = repository.download(_wanted_files)
    else:
        whole = _has_all_weights(cached)
        if is_offline() or (whole and not _may_lack_others(cached)):
            return cached
        try:
            found = repository.complete(cached, _wanted_files)
        except UserError as error:
            if not whole:
                raise
            log.warning(
                "%s is taken from the local cache, which may lack its tokenizer or sentence files; "
                "set HF_HUB_OFFLINE=1 to take the cache without asking the hub (%s)", path, error,
            )  # fmt: skip
            found = None
    if found is None:
        return cached
    for name in _OPTIONAL:
        if may_have(found, name):
            record_absence(found, name)
    return found


def _wanted_files(names: Sequence[str]) -> list[str]:
    """The files of a repository that are read: weights in one format, and what is beside them."""
    return [*_weights(names), *(name for name in names if name.endswith(BESIDE_WEIGHTS))]


def _weights(names: Sequence[str]) -> list[str]:
    """The files with the weights that are read, as ``open_tensors`` chooses, and an adapter."""
    own = [tensor_files.WEIGHTS] if tensor_files.WEIGHTS in names else []
    if not own and tensor_files.INDEX in names:
        own = [name for name in names if _SHARD.fullmatch(name)]
    if own:
        return [*own, *(name for name in names if name == folder_kinds.ADAPTER_WEIGHTS)]
    found = [name for name in names if name.endswith(".safetensors")]
    return found or [name for name in names if fnmatch(name, "*flax_model*.msgpack")]


def files_of_model(directory: Path) -> list[Path]:
    """The files that a model is read from: its config, its weights, and those of an adapter."""
    inner = folder_kinds.inner_folder(directory)
    names = sorted(file.name for file in inner.iterdir() if file.is_file())
    configs = [n for n in (folder_kinds.CONFIG, folder_kinds.ADAPTER_CONFIG) if n in names]
    return [inner / name for name in (*configs, *_weights(names))]


def _has_all_weights(snapshot: Path) -> bool:
    """Whether no weights are missing from a snapshot; an interrupted download leaves a part."""
    folder = folder_kinds.inner_folder(snapshot)
    names = {file.name for file in folder.iterdir() if file.is_file()}
    if tensor_files.WEIGHTS in names:
        return True
    found = _weights(sorted(names))
    if tensor_files.INDEX in names:
        places = tensor_files.read_json(folder / tensor_files.INDEX).get("weight_map")
        if isinstance(places, dict) and not set(map(str, places.values())) <= names:
            return False
    parts = [match for match in map(_PART.fullmatch, found) if match]
    counts = Counter((part["stem"], part["total"]) for part in parts)
    return bool(found) and all(count == int(total) for (_, total), count in counts.items())


def _may_lack_others(snapshot: Path) -> bool:
    """Whether a repository may have a tokenizer, or sentence files, that are not there."""
    return lacks_pooling(snapshot) or any(may_have(snapshot, name) for name in _OPTIONAL)


def load_directory(
    directory: Path,
    *,
    architecture: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    compute: ComputeConfig = PLAIN,
    mesh: Mesh | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a Hugging Face directory and its parameters, of ``dtype``. An adapter of PEFT is
    merged into its base.

    Another ``architecture`` of the same family, or another ``num_labels``, takes the layers from
    the file. Heads that the file does not hold are initialised, and those that the model does not
    have are passed over; both are logged by name. Not so the table that a decoder's logits come
    from: without it a file is not whole, unless the caller gave the ``architecture``. One parameter
    at a time is on the host; with a ``mesh`` each goes where the sharding rules put it.

    Raises UserError for whatever is missing, extra, mis-shaped, damaged or unknown, and for folders
    of another kind, saying what they are.
    """
    source = _find_source(directory)
    folder, adapter = source.folder, source.adapter
    architecture, (identity, own, config) = _describe(source, architecture, num_labels)
    own, config = (
        replace(each, **read_sentence_files(source.directory, each)) for each in (own, config)
    )
    family = identity.family
    tensors: Mapping[str, Any] = tensor_files.open_tensors(folder)
    with _naming(folder):
        require_sizes(config, {**tensors, **({} if adapter is None else adapter.saved)})
        tensors = unwrapped(tensors, family.weights(config))
        if family.settle is not None:
            own, config = family.settle(own, tensors), family.settle(config, tensors)
    platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
    model = build_model(config, compute.resolve(platform))
    place = Placement.of(model, dtype, mesh)
    with _naming(folder):
        if adapter is not None:
            table, boxed = family.weights(config), boxed_shapes(model)
            tensors = peft.adapted_tensors(adapter, tensors, table, boxed)
        reading = read_parameters(
            family.weights(config),
            tensors,
            place.shapes,
            getattr(config, "vocab_size", 0),
            ignored=_other_heads(identity, own, model, tensors, place, architecture is not None),
            fresh=set(place.shapes) - body_names(model),
            resized_heads=config != own or identity.own is None,
            required=() if architecture else ("lm_head",),
        )
        leaves = {path: place.put(path, value) for path, value in reading}
    params = unflatten_dict(leaves, sep="/")
    absent = set(place.shapes) - set(params)
    return model, params | fresh_heads(model, place, absent, folder, seed)


def directory_config(directory: Path, architecture: str | None = None) -> TransformerConfig:
    """The config of the model that ``load_directory`` gives; reads no weights."""
    source = _find_source(directory)
    folder = source.folder
    _, (identity, _, model) = _describe(source, architecture, None)
    model = replace(model, **read_sentence_files(source.directory, model))
    family = identity.family
    if family.settle is None:
        return model
    tensors: Mapping[str, Any] = tensor_files.open_tensors(folder)
    with _naming(folder):
        return family.settle(model, unwrapped(tensors, family.weights(model)))


def initial_directory_config(directory: Path, architecture: str) -> TransformerConfig:
    """As ``directory_config``, with the ``architecture`` only if the file's family has it, or it is
    a part of the file's model.

    Raises UserError for an adapter that was trained with dropout, which there is none of here.
    """
    adapter = _find_source(directory).adapter
    if adapter is not None and adapter.dropout:
        raise UserError(
            f"{directory} is an adapter that was trained with lora_dropout {adapter.dropout:g}, "
            "and there is none for adapters here; to start from the merged weights, set it to 0 in "
            f"its {folder_kinds.ADAPTER_CONFIG}"
        )
    try:
        model = directory_config(directory)
    except UserError:  # a file without a name that is known
        return directory_config(directory, architecture)
    if may_be_read_as(model, architecture):
        return directory_config(directory, architecture)
    return model


@dataclass(frozen=True)
class _Source:
    """The directory with the sentence files of a model, the folder with config.json and weights,
    and the adapter to merge into them."""

    directory: Path
    folder: Path
    adapter: peft.Adapter | None = None


def _find_source(directory: Path) -> _Source:
    """Raises UserError for a folder of another kind."""
    folder, described = folder_kinds.inner_folder(directory), peft.read_adapter_config(directory)
    base = adapter = None
    if described is not None:
        name, revision = str(described["base_model_name_or_path"]), described.get("revision")
        beside, is_folder = directory / name, Path(name).expanduser().is_dir()
        if beside.is_dir() and not is_folder:
            base = beside
        else:
            base = find_directory(f"{name}@{revision}" if revision and not is_folder else name)
    if described is not None and base is not None:
        adapter = peft.open_adapter(directory, described)
    if base is None or adapter is None:
        folder_kinds.require_model(folder)
        return _Source(directory, folder)
    inner = folder_kinds.inner_folder(base)
    folder_kinds.require_model(inner)
    own = is_there(directory / MODULES)
    return _Source(directory if own else base, inner, adapter)


def tokenizer_folder(directory: Path) -> Path:
    """Where the tokenizer of a model is: in the folder of its weights, or beside its adapter."""
    folder = folder_kinds.inner_folder(directory)
    if folder_kinds.holds_adapter(folder) and not folder_kinds.carried_files(folder):
        return _find_source(directory).folder
    return folder


def _describe(
    source: _Source, architecture: str | None, num_labels: int | None
) -> tuple[str | None, tuple[Identity, TransformerConfig, TransformerConfig]]:
    """The architecture that is asked for, by the caller or by the adapter, and ``_read_config``."""
    folder, adapter = source.folder, source.adapter
    found = _read_config(folder, architecture, num_labels)
    if adapter is None:
        return architecture, found
    family, config = found[0].family, found[2]
    if architecture is None:
        kind = family.model_type(config.architecture)
        known = [name for name in family.architectures if family.model_type(name) == kind]
        architecture = adapter.architecture(known)
        found = _read_config(folder, architecture, num_labels)
    if num_labels is None:
        num_labels = adapter.num_labels(family.weights(found[2]))
        found = _read_config(folder, architecture, num_labels)
    vocab_size = adapter.vocab_size(family.weights(found[2]))
    if vocab_size is not None:
        size: Any = {"vocab_size": vocab_size}
        found = found[0], replace(found[1], **size), replace(found[2], **size)
    return architecture, found


def _read_config(
    directory: Path, architecture: str | None, num_labels: int | None
) -> tuple[Identity, TransformerConfig, TransformerConfig]:
    """What a config.json describes, the config of the file's own model, and the one asked for."""
    described = folder_kinds.read_config(directory)
    with _naming(directory):
        try:
            identity = identify(described, architecture)
            family, wanted = identity.family, identity.wanted
            own = family.from_huggingface(identity.own or wanted)
            kept = kept_fields(identity.own or wanted, family.to_huggingface(own), family.aliases)
            if num_labels is not None and num_labels != own.num_labels:
                wanted = wanted | {"id2label": None, "label2id": None, "num_labels": num_labels}
            config = family.from_huggingface(wanted)
            if num_labels is not None and num_labels != config.num_labels:  # in timm's files
                config = replace(config, num_labels=num_labels, label_names=())
            if getattr(own, "causal", False) and described.get("is_causal") is False:
                raise UserError(
                    "config.json has is_causal false, which makes a decoder attend both ways; such "
                    "models are not supported"
                )
            own, config = (
                _with_settings(replace(each, hub_fields=kept), directory, described)
                for each in (own, config)
            )
            return identity, own, config
        except UserError as error:
            name = _faulty_field(described, architecture)
            if name is None or name.rpartition(".")[2] in str(error):
                raise
            raise UserError(f"{error}; look at its field {name}") from error
        except _OF_A_WRONG_KIND as error:
            name = _faulty_field(described, architecture)
            raise UserError(
                f"config.json has {name or 'a field'} of a kind that cannot be read "
                f"({error!s:.200}); compare it with that of a published model"
            ) from error


_OF_A_WRONG_KIND = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What readers raise for a field of a wrong kind, besides UserError."""


def _faulty_field(described: Mapping[str, Any], architecture: str | None) -> str | None:
    """The field without which a config.json that is refused could be read; None if no one field
    is at fault."""
    if _is_readable(described, architecture):
        return None
    for name in sorted(described.keys() - {"architectures", "model_type"}):
        inner = described[name] if isinstance(described[name], dict) else {}
        without = {key: value for key, value in described.items() if key != name}
        for part in inner:
            rest = {key: value for key, value in inner.items() if key != part}
            if _is_readable({**without, name: rest}, architecture):
                return f"{name}.{part}"
        if _is_readable(without, architecture):
            return name
    return None


def _is_readable(described: Mapping[str, Any], architecture: str | None) -> bool:
    try:
        identity = identify(described, architecture)
        identity.family.from_huggingface(identity.own or identity.wanted)
    except (UserError, *_OF_A_WRONG_KIND):
        return False
    return True


def _with_settings(
    config: TransformerConfig, directory: Path, described: Mapping[str, Any]
) -> TransformerConfig:
    """A model of text with the generation settings of its folder."""
    if not isinstance(config, TextConfig):
        return config
    settings = generation_settings.read_folder(directory, config, described)
    return replace(config, generation=settings)


def _other_heads(
    identity: Identity,
    own: TransformerConfig,
    model: nn.Module,
    tensors: Mapping[str, Any],
    place: Placement,
    asked: bool,
) -> frozenset[str]:
    """Tensors in the file that belong to heads which ``config`` does not have; they are logged.

    They are those of the file's own model, of the heads of the family's other architectures, and,
    if the caller has ``asked`` for an architecture, all tensors outside the layers.
    """
    config: TransformerConfig = model.config
    family, table = identity.family, identity.family.weights(config)
    unknown = set(tensors) - known_names(table, tensors, place.shapes)
    if not unknown:
        return frozenset()
    found: set[str] = set()
    if config != own:
        shapes = nn.meta.unbox(boxed_shapes(build_model(own, PLAIN)))
        found |= known_names(family.weights(own), unknown, shapes)
    for architecture in family.architectures if unknown - found else ():
        if family.model_type(architecture) == family.model_type(config.architecture):
            other = family.weights(replace(config, architecture=architecture))
            found |= head_names(other, unknown, body_names(model))
    if asked and any(name.startswith(table.prefix) for name in tensors) and table.prefix:
        found |= {name for name in unknown if not name.startswith(table.prefix)}
    if found:
        log.info(
            "%s has no use for %s in the file: left out",
            config.architecture, some(sorted({name.rpartition(".")[0] for name in found})),
        )  # fmt: skip
    return frozenset(found)


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Puts the directory before what is wrong with it."""
    try:
        yield
    except UserError as error:
        known = str(directory) in str(error)
        raise error if known else UserError(f"{directory}: {error}") from None
