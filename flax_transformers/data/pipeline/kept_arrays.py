"""Arrays that follow from a store, kept in files of its folder, which data workers share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np

from flax_transformers.data.store.files import StoreArray, StoreReader
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import LocalFolder


def kept_array(
    store: TokenStore,
    name: str,
    dtype: np.dtype,
    build: Callable[[], Iterator[np.ndarray]],
    is_intact: Callable[[StoreArray], bool],
) -> np.ndarray | StoreArray:
    """The array whose blocks ``build`` yields, in the file ``name`` of a local store.

    ``name`` must determine the content. A file that is not intact is built again. If the folder is
    not writable, and for a store in a bucket, the array stays in memory.
    """
    if store.is_local:
        kept = _kept(store, name, dtype, is_intact)
        if kept is None:
            # Not replaced: a process that wrote the same array before this one is reading it.
            with contextlib.suppress(UserError, OSError):  # a full disk is not an error
                blocks = (block.view(np.uint8).data for block in build())
                LocalFolder(store.directory).write(name, blocks, replace=False)
            kept = _kept(store, name, dtype, is_intact)
        if kept is not None:
            return kept
    return np.concatenate(list(build()))


def shared_array(store: TokenStore, name: str, dtype: np.dtype, length: int) -> StoreArray | None:
    """The array that `kept_array` verified in another process; None if it was deleted."""
    try:
        return _reader(store).array(name, dtype, length)
    except UserError:
        return None


def _kept(
    store: TokenStore, name: str, dtype: np.dtype, is_intact: Callable[[StoreArray], bool]
) -> StoreArray | None:
    """The array in a file; None if there is none. A damaged one is deleted."""
    with contextlib.suppress(UserError, OSError):
        length = os.path.getsize(os.path.join(store.directory, name)) // dtype.itemsize
        kept = _reader(store).array(name, dtype, length)
        if is_intact(kept):
            return kept
        LocalFolder(store.directory).delete(name)
    return None


def _reader(store: TokenStore) -> StoreReader:
    return StoreReader(LocalFolder(store.directory), "token store")
