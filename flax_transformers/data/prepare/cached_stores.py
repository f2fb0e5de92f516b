"""Default folders of stores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flax_transformers.data.base import Tokenizers
from flax_transformers.data.prepare.origin import Origin
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import MANIFEST
from flax_transformers.data.store.tokenizer import is_saved, load_saved_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import cache_root, keep
from flax_transformers.storage.folders import open_folder


def cache_directory(origins: Mapping[str, Origin], identity: Callable[[], str]) -> str:
    """The folder named by the ``identity`` of what the store is made from.

    If a source no longer exists: the folder that was used for its path before.
    """
    stores = os.path.join(cache_root(), "stores")
    places: dict[str, list[Any]] = {
        name: [os.path.abspath(os.path.expanduser(one.path)), one.settings]
        for name, one in origins.items()
    }
    for name, one in origins.items():
        if one.all_splits:
            places[name].append("all splits")
    known = os.path.join(stores, "known", digest(places)[:16])
    try:
        name = identity()[:16]
    except UserError:
        with contextlib.suppress(OSError):
            return os.path.join(stores, os.path.basename(Path(known).read_text()))
        raise
    keep(known, name)
    return os.path.join(stores, name)


def text_directory(
    origins: Mapping[str, Origin],
    identity: Callable[[Mapping[str, Origin]], str],
    of_run: Tokenizers,
    *,
    trained_on: bool,
    marker: str = MANIFEST,
) -> str:
    """The default folder of a store of texts, or of several, which has the file ``marker``
    if it is finished.

    A run that has trained already (``of_run`` are its tokenizers) keeps the store of an earlier
    version that it was ``trained_on``, unless there is one of this version with its tokenizer. A
    store of an earlier version is also used if its source no longer exists.
    """

    def named(ones: Mapping[str, Origin]) -> str:
        return beside_others(cache_directory(ones, lambda: identity(ones)), of_run)

    try:
        directory = named(origins)
    except UserError:
        for earlier in _former(origins):
            with contextlib.suppress(UserError):
                return named(earlier)
        raise
    if not (of_run and trained_on) or open_folder(directory).exists(marker):
        return directory
    return next(former_stores(origins, identity, of_run, marker=marker), directory)


def former_stores(
    origins: Mapping[str, Origin],
    identity: Callable[[Mapping[str, Origin]], str],
    of_run: Tokenizers,
    *,
    marker: str = MANIFEST,
) -> Iterator[str]:
    """The default folders of finished stores of earlier versions. Arguments: `text_directory`."""
    for earlier in _former(origins):
        with contextlib.suppress(UserError):
            directory = cache_directory(earlier, partial(identity, earlier))
            if open_folder(found := beside_others(directory, of_run)).exists(marker):
                yield found


def _former(origins: Mapping[str, Origin]) -> list[dict[str, Origin]]:
    """The origins as earlier versions name their stores, the newest first."""
    newest = max((one.version for one in origins.values()), default=1)
    return [
        {name: one.former(version, all_splits=whole) for name, one in origins.items()}
        for version in range(newest, 0, -1)
        for whole in (False, True)
    ][1:]


def beside_others(directory: str, of_run: Tokenizers) -> str:
    """``directory``, or a folder beside it if its store has another tokenizer than the run."""
    folder, given = open_folder(directory), of_run.get("tokenizer")
    if given is None or not is_saved(folder):
        return directory
    if load_saved_tokenizer(folder).fingerprint == given.fingerprint:
        return directory
    return f"{directory}-{given.fingerprint[:12]}"
