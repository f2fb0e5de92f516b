"""The tokenizer inside a store's folder, on a local disk or in a bucket."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flax_transformers.data.folders import Folder, LocalFolder
from flax_transformers.data.tokenizer_kinds import CONFIG_FILE
from flax_transformers.data.tokenizers import Tokenizer, load_tokenizer


def save_tokenizer(folder: Folder, tokenizer: Tokenizer) -> None:
    """Into a store's folder; its config file is written last."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        files = sorted(Path(scratch).iterdir(), key=lambda file: file.name == CONFIG_FILE)
        for file in files:
            folder.write(f"tokenizer/{file.name}", file.read_bytes())


def load_saved_tokenizer(folder: Folder) -> Tokenizer:
    """The tokenizer in a store's folder."""
    if isinstance(folder, LocalFolder):
        return load_tokenizer(os.path.join(folder.path, "tokenizer"))
    with tempfile.TemporaryDirectory() as scratch:
        for name in folder.names("tokenizer/"):
            Path(scratch, os.path.basename(name)).write_bytes(folder.read(name))
        return load_tokenizer(scratch)
