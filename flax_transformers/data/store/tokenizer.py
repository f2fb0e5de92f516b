"""The tokenizers inside a store's folder, on a local disk or in a bucket."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from etils import epath

from flax_transformers.data.tokenizers.facts import CONFIG_FILE
from flax_transformers.data.tokenizers.load import (
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder, LocalFolder

TARGET = "target_tokenizer"
"""Where that of the targets lies, if they have one of their own."""


def save_tokenizer(folder: Folder, tokenizer: Tokenizer, name: str = "tokenizer") -> None:
    """Into a store's folder, below ``name``; its config file is written last."""
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
    """Whether a tokenizer that is to be loaded is there."""
    return config.path is not None and epath.Path(config.path).expanduser().exists()


def load(config: TokenizerConfig) -> Tokenizer:
    """One that needs no training. Raises UserError if it is not there."""
    return train_tokenizer(config, ())


def own_tokenizer(
    folder: Folder,
    config: TokenizerConfig,
    given: Tokenizer | None = None,
    name: str = "tokenizer",
) -> Tokenizer:
    """A store's own tokenizer. Raises UserError if another one is given, or lies at the path."""
    tokenizer = load_saved_tokenizer(folder, name)
    where = "this run"
    if given is None and at_hand(config):
        given, where = load(config), str(config.path)
    if given is not None and given.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The token store in {folder.path} was made with tokenizer "
            f"{tokenizer.fingerprint[:12]}, while {where} holds {given.fingerprint[:12]}; "
            "choose another store directory or the tokenizer it was made with."
        )
    return tokenizer
