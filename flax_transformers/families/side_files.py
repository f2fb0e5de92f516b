"""Files beside the weights of a Hugging Face directory: tokenizer, generation, preprocessing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flax_transformers.families import tensor_files

CONFIG = "config.json"
GENERATION = "generation_config.json"

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "source.spm", "target.spm", "target_vocab.json", "chat_template.jinja",
    GENERATION, "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files that belong to a model beside its weights; they are copied as they are."""


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
