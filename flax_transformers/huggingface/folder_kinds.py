"""Kinds of model folders: which can be read, and what to do about the others.

Looked at before any tensor: adapters, quantised weights, pickles, variants, subfolders and the
layouts of other libraries.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_transformers.errors import UserError
from flax_transformers.huggingface.tensor_files import INDEX, WEIGHTS, flax_files, read_json
from flax_transformers.storage.paths import is_there

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "spm.model", "source.spm", "target.spm", "target_vocab.json",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
"""Files of the tokenizer and of preprocessing, which are copied as they are."""
_TEMPLATES = "additional_chat_templates"
"""The folder of the named chat templates, which are copied too."""

_MAX_NAMES = 10_000
"""Number of entries of a folder that are examined."""

_VARIANT = re.compile(
    r"model\.(?!safetensors)([\w-]+?)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"
    r"|model-\d+-of-\d+\.(?!safetensors)([\w-]+)\.safetensors"
    r"|model\.safetensors\.index\.(?!json)([\w-]+)\.json"
)
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")

_SAVE = "save_pretrained('safetensors')"


def carried_files(directory: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Those of the CARRIED files that are in a directory, and its named chat templates, by name."""
    if directory is None:
        return {}
    files = {name: Path(directory) / name for name in CARRIED}
    templates = sorted((Path(directory) / _TEMPLATES).glob("*.jinja"))
    files |= {f"{_TEMPLATES}/{file.name}": file for file in templates}
    return {name: file for name, file in files.items() if is_there(file)}


def inner_folder(directory: Path) -> Path:
    """The folder with config.json and weights: this one or, in the layout of sentence-transformers,
    the folder of its first module (``0_Transformer``)."""
    names = _names(directory)
    inner = _first_module(directory) if "modules.json" in names else "0_Transformer"
    if CONFIG not in names and inner in names and CONFIG in _names(directory / inner):
        return directory / inner
    return directory


def require_model(directory: Path) -> None:
    """Raise UserError, naming the kind, for a folder without config.json, and for an adapter that
    has no base here or that only PEFT can merge."""
    names = _names(directory)
    adapted = any(name.startswith("adapter_model.") for name in names)
    whole = any(name.endswith(".safetensors") and name.startswith("model") for name in names)
    if ADAPTER_CONFIG in names and (adapted or not whole):
        raise UserError(_adapter(directory, beside=whole))
    if CONFIG not in names:
        raise UserError(_no_config(directory, names))


def holds_adapter(directory: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format, and no model beside it."""
    names = _names(directory)
    whole = any(name.endswith(".safetensors") and name.startswith("model") for name in names)
    return ADAPTER_CONFIG in names and ADAPTER_WEIGHTS in names and not whole


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises UserError, with the remedy, for quantised weights and if
    there are neither safetensors nor weights of transformers' Flax classes."""
    described = read_json(directory / CONFIG)
    names = _names(directory)
    quantisation = described.get("quantization_config") or described.get("compression_config")
    other = next((n for n in ("quantize_config.json", "quant_config.json") if n in names), None)
    if quantisation or other:
        raise UserError(_quantised(directory, quantisation, other))
    if WEIGHTS not in names and INDEX not in names and not flax_files(directory):
        raise UserError(_no_weights(directory, names, described))
    return described


def _names(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False))
    except NotADirectoryError:
        return []
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror or error}); give a folder that you may "
            "read"
        ) from None


def _first_module(directory: Path) -> str:
    """The folder of the transformer in a sentence-transformers folder."""
    try:
        modules = read_json(directory / "modules.json", list)
    except UserError:
        return ""
    paths = [module.get("path") for module in modules if isinstance(module, Mapping)]
    return next((path for path in paths if isinstance(path, str) and path), "")


def _adapter(directory: Path, beside: bool) -> str:
    described = read_json(directory / ADAPTER_CONFIG)
    base = described.get("base_model_name_or_path")
    known = (
        f"base: {str(base)[:200]}"
        if base
        else "set its base, which adapter_config.json does not name, as base_model_name_or_path "
        "there first"
    )
    kind = str(described.get("peft_type") or "PEFT")[:40]
    return (
        f"{directory} holds an adapter ({kind}) {'beside' if beside else 'and not'} the weights of "
        f'a model; merge it into its base by `python -c "from peft import AutoPeftModel as M; '
        f"M.from_pretrained('{directory}').merge_and_unload().save_pretrained('merged')\"` "
        f"({known}) and give the folder that this writes"
        f"{', or remove the adapter_* files to read the weights without it' if beside else ''}"
    )


def _quantised(directory: Path, config: Any, file: str | None) -> str:
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method is None and isinstance(config, Mapping):
        bits = [bits for bits in (4, 8) if config.get(f"load_in_{bits}bit")]
        method = f"bitsandbytes, {bits[0]} bits" if bits else None
    where = file or f"quantization_config of {CONFIG}"
    return (
        f"{directory} holds quantised weights ({str(method or 'method not named')[:60]}, by "
        f"{where}), which cannot be read; give the model from before quantisation, or load it in "
        f"transformers, call model.dequantize() and {_SAVE} it"
    )


def _no_config(directory: Path, names: list[str]) -> str:
    missing = f"{directory / CONFIG} is missing"
    if "model_index.json" in names:
        return (
            f"{directory} is a diffusers pipeline; give the folder of one of its models"
            f"{_subfolders(directory, names)}"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return _gguf(directory, ggufs[0])
    if "params.json" in names:
        return (
            f"{missing}, and params.json is of Meta's or Mistral's own release; give the release "
            "in Hugging Face format, or convert it with the script of transformers "
            "(convert_llama_weights_to_hf.py)"
        )
    if "snapshots" in names:
        cached = sorted(str(path.parent) for path in (directory / "snapshots").glob(f"*/{CONFIG}"))
        return (
            f"{directory} is the folder of a repository in the hub's cache; give a snapshot in it: "
            f"{', '.join(cached) or 'none has a config.json'}"
        )
    if any(name.endswith(".ckpt.index") for name in names):
        return (
            f"{missing}, and the weights are a TensorFlow checkpoint; convert it with the script "
            "of transformers for its model (convert_bert_original_tf_checkpoint_to_pytorch.py)"
        )
    if inner := _subfolders(directory, names):
        return f"{missing}; give the subfolder that the model is in{inner}"
    if any(name.endswith(".safetensors") for name in names):
        return f"{missing}; copy the {CONFIG} of these weights to it"
    if weights := _pickle(names):
        return (
            f"{missing}, and {weights} is a pickle, which can run any code and is never read; load "
            f"it with the program that wrote it and {_SAVE} the model"
        )
    return (
        f"{directory} holds no checkpoint and no {CONFIG}; give the folder of a run or of a model"
    )


def _no_weights(directory: Path, names: list[str], described: Mapping[str, Any]) -> str:
    variants = sorted(
        {"".join(filter(None, m.groups())) for m in map(_VARIANT.fullmatch, names) if m}
    )
    if variants:
        files = [name for name in names if _VARIANT.fullmatch(name)]
        more = ", and the others likewise" if len(files) > 1 else ""
        renamed = files[0].replace(f".{variants[0]}", "", 1)
        return (
            f"{directory} holds its weights as the variant {variants[0]!r} alone; rename "
            f"{files[0]} to {renamed}{more}"
        )
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        total = int(_SHARD.fullmatch(shards[0])[1])  # type: ignore[index]
        return (
            f"{directory} holds {len(shards)} of {total} shards but no {INDEX}; copy the index"
            f"{' and the missing shards' if len(shards) < total else ''} too"
        )
    if others := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{directory} has neither {WEIGHTS} nor {INDEX}, but {others[0]}; rename it to "
            f"{WEIGHTS} if these are the model's weights"
        )
    if command := _conversion(directory, names, described):
        return command
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return _gguf(directory, ggufs[0])
    if inner := _subfolders(directory, names):
        return (
            f"{directory} has neither {WEIGHTS} nor {INDEX}; give the subfolder that the weights "
            f"are in{inner}"
        )
    return f"{directory} has neither {WEIGHTS} nor {INDEX}; check the path"


def _conversion(directory: Path, names: list[str], described: Mapping[str, Any]) -> str | None:
    """The remedy for weights of another format, if there are any."""
    architectures = described.get("architectures")
    kind = architectures[0] if isinstance(architectures, list) and architectures else "AutoModel"
    kind = kind if isinstance(kind, str) and kind.isidentifier() else "AutoModel"
    for pattern, what, option, needed in (
        (r"pytorch_model.*\.bin(\.index\.json)?", "a pickle", "", ""),
        (r"tf_model.*\.h5(\.index\.json)?", "of TensorFlow", ", from_tf=True", "4 "),
    ):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            danger = ", which can run any code and is never read" if what == "a pickle" else ""
            return (
                f"{directory / found[0]} is {what}{danger}; write {WEIGHTS} with transformers "
                f'{needed}by `python -c "from transformers import {kind} as M; '
                f"M.from_pretrained('{directory}'{option}).{_SAVE}\"` and give that folder"
            )
    if weights := _pickle(names):
        return (
            f"{directory / weights} is a pickle, which can run any code and is never read; load it "
            f"with the program that wrote it and {_SAVE} the model, which writes {WEIGHTS}"
        )
    if onnx := next((n for n in names if n.endswith((".onnx", ".tflite", ".ot"))), None):
        return (
            f"{directory} holds {onnx} alone, a program and no weights to train; give the folder "
            "that it was exported from"
        )
    return None


def _pickle(names: list[str]) -> str | None:
    endings = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    no_weights = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    return next((n for n in names if n.endswith(endings) and n not in no_weights), None)


def _gguf(directory: Path, name: str) -> str:
    return (
        f"{directory / name} is a GGUF file of llama.cpp, which is not read; give the original "
        f'model, or write its dequantised weights by `python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{directory}', gguf_file='{name}')."
        f'{_SAVE}"`'
    )


def _subfolders(directory: Path, names: list[str]) -> str:
    """Sub-folders with a model, as the end of a sentence; empty if there are none."""
    found = []
    for name in names:
        path = directory / name
        if path.is_dir() and not name.startswith("."):
            try:
                inside = _names(path)
            except UserError:
                continue
            if CONFIG in inside or WEIGHTS in inside or INDEX in inside:
                found.append(name)
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f": {', '.join(found[:4])}{more}" if found else ""
