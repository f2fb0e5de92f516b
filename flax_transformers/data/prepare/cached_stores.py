"""Where stores lie that the config gives no place to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from flax_transformers.data.prepare.store_locks import Corpus
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.tokenizer import is_saved, load_saved_tokenizer
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import cache_root, keep
from flax_transformers.storage.folders import Folder, open_folder

Tokenizers = Mapping[str, Tokenizer]
"""Tokenizers by the names of their folders, "tokenizer" and "target_tokenizer"."""


def cache_directory(corpora: Mapping[str, Corpus], identity: Callable[[], str]) -> str:
    """A folder named after the ``identity`` of what the store is made from.

    Where a corpus is no longer at hand, the folder that was named for its path before.
    """
    stores = os.path.join(cache_root(), "stores")
    places = {
        name: [os.path.abspath(os.path.expanduser(one.path)), one.settings]
        for name, one in corpora.items()
    }
    known = os.path.join(stores, "known", digest(places)[:16])
    try:
        name = identity()[:16]
    except UserError:
        with contextlib.suppress(OSError):
            return os.path.join(stores, os.path.basename(Path(known).read_text()))
        raise
    keep(known, name)
    return os.path.join(stores, name)


def no_store(kind: str, folder: Folder, config: TokenizerConfig, of_run: Tokenizers) -> str:
    """What to say where there is none yet, and several processes are to read it."""
    resumed = (
        " and, as this run has trained already, with --data.tokenizer.path set to the folder "
        "`tokenizer` of its newest checkpoint"
    )
    return (
        f"There is no finished {kind} in {folder.path}; run `flax-transformers prepare` with the "
        f"same config first, in one process{resumed if of_run and config.needs_training else ''}."
    )


def beside_others(directory: str, of_run: Tokenizers) -> str:
    """``directory``, or one beside it if the store there has another tokenizer than the run's."""
    folder, given = open_folder(directory), of_run.get("tokenizer")
    if given is None or not is_saved(folder):
        return directory
    if load_saved_tokenizer(folder).fingerprint == given.fingerprint:
        return directory
    return f"{directory}-{given.fingerprint[:12]}"
