"""Files beside the weights of a Hugging Face directory that are copied as they are."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "config.json"

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "source.spm", "target.spm", "target_vocab.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
"""Files of the tokenizer and of preprocessing."""


def carried_files(directory: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Those of the CARRIED files that are in a directory, by name."""
    if directory is None:
        return {}
    files = {name: Path(directory) / name for name in CARRIED}
    return {name: file for name, file in files.items() if file.is_file()}
