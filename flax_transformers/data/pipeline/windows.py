"""The window index: the windows of a token store that become training examples.

Windows consist of whole sentences, filled greedily, or are cut anywhere if the objective allows it.
The tokens of a window and the document ends strictly inside it (each needs a separator) are at most
``spec.length``, and its sentences at most ``spec.sentences``. A sentence longer than a window is
split. Every token of the split is in exactly one window, in order.
"""

from __future__ import annotations

import contextlib
import os

import numpy as np

from flax_transformers.data.store.files import StoreArray, StoreReader
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec
from flax_transformers.storage.folders import LocalFolder

WINDOW = np.dtype([("start", "<i8"), ("length", "<i4")])
_SENTENCES_AT_ONCE = 1 << 22  # about 200 MB of temporary arrays
_CHECKED = 1 << 18  # windows read at once to check them


def window_index(store: TokenStore, spec: WindowSpec) -> np.ndarray:
    """All windows of a split, in order: structured array [windows] of (start int64, length int32).

    Raises UserError for a split without tokens and for a length below 1.
    """
    if spec.length < 1:
        raise UserError(
            f"Windows of {spec.length} tokens have no space for text; use longer sequences."
        )
    if store.num_tokens == 0:
        raise UserError(
            f"The {store.split} split of the token store in {store.directory} has no tokens; "
            "check the data source."
        )
    if spec.whole_sentences:
        starts = _window_starts(store.sentence_ends, store.document_ends, spec)
    elif spec.cross_documents:
        starts = _filled(store.document_ends, spec.length)
    else:  # a document as one long sentence
        starts = _window_starts(store.document_ends, store.document_ends, spec)
    windows = np.zeros(len(starts), WINDOW)
    windows["start"] = starts
    windows["length"] = np.diff(starts, append=store.num_tokens)
    return windows


def _filled(document_ends: np.ndarray, length: int) -> np.ndarray:
    """Starts of windows of ``length`` positions each, separators included.

    The separator of document j, from 0, is at position ``document_ends[j] + j``. A window never
    starts with a separator.
    """
    separators = document_ends + np.arange(len(document_ends))
    places = np.arange(0, separators[-1], length)
    return np.unique(places - np.searchsorted(separators, places, side="left"))


def _window_starts(
    sentence_ends: np.ndarray, document_ends: np.ndarray, spec: WindowSpec
) -> np.ndarray:
    """Processes the sentences in blocks; a block starts at the first undecided window."""
    block_size = max(
        _SENTENCES_AT_ONCE, spec.length + 1
    )  # so that each block contains the end of a window
    found, position, total = [], 0, int(sentence_ends[-1])
    while position < total:
        first = int(np.searchsorted(sentence_ends, position, side="right"))
        ends = sentence_ends[first : first + block_size]
        units = _split_long(position, ends, spec.length)
        last_block = first + block_size >= len(sentence_ends)
        starts = _chain(position, units, document_ends, spec, last_block)
        found.append(starts[:-1])
        position = int(starts[-1])
    return np.concatenate(found)


def _split_long(position: int, ends: np.ndarray, length: int) -> np.ndarray:
    """Ends of sentences, with long sentences split every ``length`` tokens."""
    starts = np.concatenate([[position], ends[:-1]])
    cuts = (ends - starts - 1) // length  # number of additional ends of each sentence
    if not cuts.any():
        return ends
    repeated = np.repeat(np.arange(len(ends)), cuts + 1)
    nth = np.arange(len(repeated)) - np.repeat(np.cumsum(cuts + 1) - (cuts + 1), cuts + 1) + 1
    return np.minimum(starts[repeated] + nth * length, ends[repeated])


def _chain(
    position: int, units: np.ndarray, document_ends: np.ndarray, spec: WindowSpec, last_block: bool
) -> np.ndarray:
    """Window starts from ``position``; the last entry is the start of the next block."""
    starts = np.concatenate([[position], units[:-1]])
    if spec.cross_documents:
        # An end d costs a separator in a window (start, end) when start < d < end.
        bound = starts + np.searchsorted(document_ends, starts, side="right") + spec.length
        cost = units + np.searchsorted(document_ends, units, side="left")
        following = np.searchsorted(cost, bound, side="right")
    else:
        document = np.searchsorted(document_ends, starts, side="right")
        limit = np.minimum(document_ends[document], starts + spec.length)
        following = np.searchsorted(units, limit, side="right")
    if spec.sentences is not None:
        following = np.minimum(following, np.arange(len(units)) + spec.sentences)
    jumps = following.tolist()  # Python integers are faster in this loop
    count, unit, chain = len(units), 0, []
    while unit < count:
        chain.append(unit)
        unit = jumps[unit]
    edges = starts[chain]
    # A window at the end of the block may continue after it: the next block decides.
    return np.append(edges, units[-1]) if last_block else edges


def cached_window_index(store: TokenStore, spec: WindowSpec) -> np.ndarray | StoreArray:
    """`window_index`, cached in the folder ``windows`` of a local store and read from there.

    Thirty million windows take half a minute and 360 MB, so the data workers of a machine share
    them (`shared_window_index`). If the folder is not writable, the index stays in memory.
    """
    if not store.is_local:
        return window_index(store, spec)
    reader, name = _place(store, spec)
    with contextlib.suppress(UserError, OSError):
        kept = reader.array(name, WINDOW, _kept_windows(store, name))
        if _covers(kept, store.num_tokens):
            return kept
    windows = window_index(store, spec)
    try:
        LocalFolder(store.directory).write(name, windows.view(np.uint8).data)
        return reader.array(name, WINDOW, len(windows))
    except (UserError, OSError):  # a read-only or full disk is not an error
        return windows


def shared_window_index(
    store: TokenStore, spec: WindowSpec, length: int
) -> np.ndarray | StoreArray:
    """The index of ``length`` windows that `cached_window_index` verified in another process."""
    reader, name = _place(store, spec)
    try:
        return reader.array(name, WINDOW, length)
    except UserError:  # it was deleted
        return window_index(store, spec)


def _place(store: TokenStore, spec: WindowSpec) -> tuple[StoreReader, str]:
    """The reader and file name of a cached index."""
    kind = "across" if spec.cross_documents else "within"
    kind += "" if spec.sentences is None else f"-{spec.sentences}"
    kind += "" if spec.whole_sentences else "-filled"
    name = f"windows/{spec.length}-{kind}-{store.fingerprint[:16]}"
    return StoreReader(LocalFolder(store.directory), "token store"), name


def _kept_windows(store: TokenStore, name: str) -> int:
    return os.path.getsize(os.path.join(store.directory, name)) // WINDOW.itemsize


def _covers(windows: StoreArray, tokens: int) -> bool:
    """Whether each window starts where the one before ends, which detects damaged entries."""
    end = 0
    for first in range(0, len(windows), _CHECKED):
        block = windows.read(first, min(first + _CHECKED, len(windows)))
        ends = block["start"] + block["length"]
        if (block["start"] != np.append(end, ends[:-1])).any():
            return False
        end = int(ends[-1])
    return end == tokens
