"""The window index: the windows of a token store that become training examples.

Windows consist of whole sentences, filled greedily, or are cut anywhere if the objective allows it.
The tokens of a window and the document ends strictly inside it (each needs a separator) are at most
``spec.length``, and its sentences at most ``spec.sentences``. A sentence longer than a window is
split. Every token of the split is in exactly one window, in order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from flax_transformers.data.pipeline.kept_arrays import kept_array, shared_array
from flax_transformers.data.store.files import StoreArray
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec

WINDOW = np.dtype([("start", "<i8"), ("length", "<i4")])
_ENDS_AT_ONCE = 1 << 22  # about 200 MB of temporary arrays
_CHECKED = 1 << 18  # windows read at once to check them


def window_index(store: TokenStore, spec: WindowSpec) -> np.ndarray:
    """All windows of a split, in order: structured array [windows] of (start int64, length int32).

    Raises UserError for a split without tokens and for a length below 1.
    """
    return np.concatenate(list(_blocks(store, spec)))


def _blocks(store: TokenStore, spec: WindowSpec) -> Iterator[np.ndarray]:
    """The windows in order, in blocks, so that memory does not grow with the store."""
    if spec.length < 1:
        raise UserError(
            f"Windows of {spec.length} tokens have no space for text; use longer sequences."
        )
    if store.num_tokens == 0:
        raise UserError(
            f"The {store.split} split of the token store in {store.directory} has no tokens; "
            "check the data source."
        )
    filled = spec.cross_documents and not spec.whole_sentences
    found = _filled(store, spec.length) if filled else _window_starts(store, spec)
    last = np.zeros(0, np.int64)  # the start of the window whose end is not known yet
    for starts in itertools.chain(found, [np.array([store.num_tokens])]):
        edges = np.append(last, starts)
        edges = edges[np.diff(edges, prepend=-1) > 0]  # increasing, but for repetitions
        windows = np.zeros(max(0, len(edges) - 1), WINDOW)
        windows["start"] = edges[:-1]
        windows["length"] = np.diff(edges)
        yield windows
        last = edges[-1:]


def _filled(store: TokenStore, length: int) -> Iterator[np.ndarray]:
    """Starts of windows of ``length`` positions each, separators included; some repeat.

    The separator of document j, from 0, is at position ``document_ends[j] + j``. A window never
    starts with a separator.
    """
    total, place, before = store.num_tokens + store.num_documents - 1, 0, 0
    for ends in store.ends_in_blocks("documents", _ENDS_AT_ONCE):
        separators = ends + np.arange(before, before + len(ends))
        places = np.arange(place, min(separators[-1] + 1, total), length)
        yield places - before - np.searchsorted(separators, places, side="left")
        place, before = place + len(places) * length, before + len(ends)


def _window_starts(store: TokenStore, spec: WindowSpec) -> Iterator[np.ndarray]:
    """Processes the sentences in blocks; a block starts at the first undecided window.

    Unless windows consist of whole sentences, a document is one long sentence.
    """
    kind = "sentences" if spec.whole_sentences else "documents"
    position, ends = 0, np.zeros(0, np.int64)
    for further in store.ends_in_blocks(kind, _ENDS_AT_ONCE):
        ends = np.append(ends[ends > position], further)
        stop = int(ends[-1])
        units = _split_long(position, ends, spec.length)
        # The document that continues after the block counts as one that ends with it.
        documents = np.append(store.document_ends_within(position, stop), stop)
        starts = _chain(position, units, documents, spec, stop == store.num_tokens)
        yield starts[:-1]
        position = int(starts[-1])


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
    build = functools.partial(_blocks, store, spec)
    is_intact = functools.partial(_covers, tokens=store.num_tokens)
    return kept_array(store, _name(store, spec), WINDOW, build, is_intact)


def shared_window_index(
    store: TokenStore, spec: WindowSpec, length: int
) -> np.ndarray | StoreArray:
    """The index of ``length`` windows that `cached_window_index` verified in another process."""
    found = shared_array(store, _name(store, spec), WINDOW, length)
    return window_index(store, spec) if found is None else found


def _name(store: TokenStore, spec: WindowSpec) -> str:
    """The file of a cached index."""
    kind = "across" if spec.cross_documents else "within"
    kind += "" if spec.sentences is None else f"-{spec.sentences}"
    kind += "" if spec.whole_sentences else "-filled"
    return f"windows/{spec.length}-{kind}-{store.fingerprint[:16]}"


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
