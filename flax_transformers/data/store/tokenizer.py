"""Tokenizers in the folder of a store, on a local disk or in a bucket."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flax_transformers.data.tokenizers.facts import CONFIG_FILE
from flax_transformers.data.tokenizers.load import (
    Tokenizer,
    TokenizerConfig,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder, LocalFolder

TARGET = "target_tokenizer"
"""Folder of the tokenizer of the targets, if they have their own."""


def save_tokenizer(folder: Folder, tokenizer: Tokenizer, name: str = "tokenizer") -> None:
    """Saves a tokenizer in a store's folder below ``name``, its config file last."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        files = sorted(Path(scratch).iterdir(), key=lambda file: file.name == CONFIG_FILE)
        for file in files:
            folder.write(f"{name}/{file.name}", file.read_bytes())


def is_saved(folder: Folder, name: str = "tokenizer") -> bool:
    """Whether `save_tokenizer` has finished."""
    return folder.exists(f"{name}/{CONFIG_FILE}")


def load_saved_tokenizer(folder: Folder, name: str = "tokenizer") -> Tokenizer:
    """The tokenizer in a store's folder."""
    if isinstance(folder, LocalFolder):
        return load_tokenizer(os.path.join(folder.path, name))
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.names(f"{name}/"):
            Path(scratch, os.path.basename(file)).write_bytes(folder.read(file))
        return load_tokenizer(scratch)


def at_hand(config: TokenizerConfig) -> bool:
    """Whether the tokenizer has a path that exists."""
    return config.path is not None and find_tokenizer(config.path, download=False).exists()


def load(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer without training. Raises UserError if it does not exist."""
    return train_tokenizer(config, ())


def own_tokenizer(
    folder: Folder, config: TokenizerConfig, given: Tokenizer | None = None, name: str = "tokenizer"
) -> Tokenizer:
    """The tokenizer of a store. Raises UserError if another one is given, or is at the path."""
    tokenizer = load_saved_tokenizer(folder, name)
    where = "this run"
    if given is None and at_hand(config):
        given, where = load(config), str(config.path)
    if given is not None and given.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The token store in {folder.path} was made with tokenizer "
            f"{tokenizer.fingerprint[:12]}, but {where} has {given.fingerprint[:12]}; choose "
            "another store directory or the tokenizer it was made with."
        )
    return tokenizer
