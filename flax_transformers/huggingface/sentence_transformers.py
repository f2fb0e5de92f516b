"""The files of sentence-transformers that describe pooling.

``modules.json`` lists the steps: the transformer, a pooling (``1_Pooling/config.json``) and maybe a
normalisation. They are the fields ``pooling`` and ``normalize_embeddings`` of a config. A sentence
may have a maximum length (``sentence_bert_config.json``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from etils import epath

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.huggingface.tensor_files import read_json
from flax_transformers.models.config import TransformerConfig
from flax_transformers.storage.paths import is_there

log = logging.getLogger(__name__)

MODULES = "modules.json"
POOLING = "1_Pooling"
_PLAIN = ("Transformer", "Pooling", "Normalize")
"""Modules without weights of their own."""
_WEIGHTS = (".safetensors", ".bin")
_EMBEDDING = ("Model", "ForCausalLM", "ForConditionalGeneration")
"""Endings of architectures that sentence-transformers takes the hidden states of."""
_SUPPORTED = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}


def read_sentence_files(directory: Path, config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config`` that the files of a folder set; none without modules.json.

    Raises UserError for a pooling that is not supported; a warning names modules that are not read.
    """
    if not is_there(directory / MODULES) or not describes_sentences(config):
        return {}
    modules = _modules(directory)
    _name_unread(directory, modules)
    found: dict[str, Any] = {"normalize_embeddings": "Normalize" in modules}
    if "Pooling" in modules:
        found["pooling"] = _pooling(directory, modules)
    return found


def vector_length_is_one(directory: Path | None, config: TransformerConfig, pool: str) -> bool:
    """Whether the vectors that ``--pool`` gives are to have length 1: as the config says, or, if it
    does not (decoders, encoder-decoders), the files of the ``directory`` that it was read from.

    A warning names another pooling, and modules that are not read.
    """
    normalize: bool | None = getattr(config, "normalize_embeddings", None)
    asked = {str(getattr(config, "pooling", ""))} if normalize is not None else set()
    if normalize is None and directory is not None and is_there(directory / MODULES):
        modules = _modules(directory)
        _name_unread(directory, modules)
        normalize = "Normalize" in modules
        asked = _modes(directory, modules) if "Pooling" in modules else set()
    if asked - {pool}:
        log.warning(
            "the model's sentence embeddings are pooled by %s; --pool %s gives other vectors",
            " and ".join(sorted(asked)), pool,
        )  # fmt: skip
    return bool(normalize)


def lacks_pooling(directory: Path) -> bool:
    """Whether a folder's modules.json names a pooling whose config.json is not there."""
    modules = _modules(directory) if is_there(directory / MODULES) else {}
    return "Pooling" in modules and not (directory / modules["Pooling"] / "config.json").is_file()


def sentence_length(directory: epath.Path | Path, *, converted: bool = False) -> int | None:
    """The maximum number of tokens of a sentence that the files of a folder set; None without.

    ``converted``: the files were copied there, without modules.json, by ``convert``.
    Warnings name what they ask for and is not done. Raises UserError for another value.
    """
    if not converted and not is_there(directory / MODULES):
        return None
    if prompt := _default_prompt(directory / "config_sentence_transformers.json"):
        log.warning(
            "%s asks for the prompt %r before every text, which is not added here; add it to yours",
            directory, prompt,
        )  # fmt: skip
    inner = directory if converted else directory / _modules(directory).get("Transformer", "")
    file = next(iter(sorted(inner.glob("sentence_*_config.json"))), None)
    given = {} if file is None else read_json(file)
    if given.get("do_lower_case"):
        log.warning("%s asks for lower case, which is not done here; lower-case your texts", file)
    length = given.get("max_seq_length")
    if fault := "" if length is None else ranges.POSITIONS.fault(length):
        raise UserError(f"{file} has max_seq_length {ranges.shown(length)}; {fault}")
    return length


def _default_prompt(file: epath.Path | Path) -> str:
    given = read_json(file) if is_there(file) else {}
    prompts, name = given.get("prompts"), given.get("default_prompt_name")
    return str(prompts.get(name) or "") if isinstance(prompts, dict) else ""


def _name_unread(directory: Path, modules: Mapping[str, str]) -> None:
    if unread := sorted(modules.keys() - {"Transformer", "Pooling", "Normalize", "Module"}):
        log.warning(
            "%s has modules that are not read: %s; embeddings of sentences are those before them",
            directory / MODULES, ", ".join(unread),
        )  # fmt: skip


def _modules(directory: epath.Path | Path) -> dict[str, str]:
    """The folders of the modules by the names of their classes."""
    return dict(_listed(directory))


def _listed(directory: epath.Path | Path) -> list[tuple[str, str]]:
    """The name of the class and the folder of each module."""
    return [
        (str(module.get("type", "")).rpartition(".")[2], str(module.get("path", "")))
        for module in read_json(directory / MODULES, list)
        if isinstance(module, dict)
    ]


def describes_sentences(config: TransformerConfig) -> bool:
    """Whether a config has fields for sentence embeddings."""
    return any(field.name == "normalize_embeddings" for field in fields(config))


def _pooling(directory: Path, modules: Mapping[str, str]) -> str:
    asked = _modes(directory, modules)
    if len(asked) != 1 or not asked <= _SUPPORTED.keys():
        raise UserError(
            f"{_pooling_file(directory, modules)} asks for "
            f"{' and '.join(sorted(asked)) or 'no pooling'}, which is not supported; only one of "
            f"cls and mean is. To read the transformer alone, remove {directory / MODULES}"
        )
    return asked.pop()


def _pooling_file(directory: Path, modules: Mapping[str, str]) -> Path:
    return directory / modules["Pooling"] / "config.json"


def _modes(directory: Path, modules: Mapping[str, str]) -> set[str]:
    """The poolings that the files ask for, whose vectors are concatenated."""
    given = read_json(_pooling_file(directory, modules))
    mode = given.get("pooling_mode")  # as newer releases say it
    modes = [mode] if isinstance(mode, str) else mode
    if isinstance(modes, list) and all(isinstance(each, str) for each in modes):
        return set(modes)
    names = {flag: name for name, flag in _SUPPORTED.items()}
    return {names.get(n, n) for n, value in given.items() if "pooling_mode" in n and value}


def sentence_files(config: TransformerConfig) -> dict[str, Any]:
    """JSON files by path, for a model that is a sentence encoder."""
    normalize: bool | None = getattr(config, "normalize_embeddings", None)
    if normalize is None or not config.architecture.endswith("Model"):
        return {}
    steps = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    pooling: str = getattr(config, "pooling", "cls")
    flags = {flag: name == pooling for name, flag in _SUPPORTED.items()}
    return {
        MODULES: [
            {
                "idx": number,
                "name": str(number),
                "path": f"{number}_{step}" if number else "",
                "type": f"sentence_transformers.models.{step}",
            }
            for number, step in enumerate(steps)
        ],
        f"{POOLING}/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **flags,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }


def carried_modules(
    directory: str | os.PathLike[str] | None, config: TransformerConfig
) -> dict[str, Path]:
    """The files of a folder that describe sentence embeddings, by name, for a model whose config
    does not (decoders, encoder-decoders) and that has no head of labels.

    A warning says why there are none although the folder has a modules.json.
    """
    if directory is None or not is_there(Path(directory) / MODULES):
        return {}
    if describes_sentences(config) or not config.architecture.endswith(_EMBEDDING):
        return {}
    folder, found = Path(directory), {MODULES: Path(directory) / MODULES}
    modules = _listed(folder)
    if modules[:1] != [("Transformer", "")]:
        log.warning(
            "%s is not copied, because its first module is no Transformer in the folder itself; "
            "copy the modules yourself",
            found[MODULES],
        )
        return {}
    for kind, path in modules:
        files = {file.name: file for file in sorted((folder / path).glob("*")) if file.is_file()}
        lacks = kind not in ("Transformer", "Normalize") and "config.json" not in files
        lacks |= kind not in _PLAIN and not any(name.endswith(_WEIGHTS) for name in files)
        apart = path in (".", "..") or path != os.path.basename(path)
        if lacks or apart or (kind == "Transformer" and path):
            fault = "lacks its config.json or its weights" if lacks else f"is in {path!r}"
            log.warning(
                "%s is not copied, because its module %s %s; copy the modules yourself",
                found[MODULES], kind, fault,
            )  # fmt: skip
            return {}
        found |= {f"{path}/{name}": file for name, file in files.items() if path}
    return found


def sentence_limit(config: TransformerConfig, carried: Mapping[str, Path]) -> dict[str, Any]:
    """The file with the maximum sentence length, unless it is copied along."""
    name = "sentence_bert_config.json"
    if not sentence_files(config) or name in carried or config.max_positions is None:
        return {}
    return {name: {"max_seq_length": config.max_positions, "do_lower_case": False}}
