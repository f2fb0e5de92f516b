"""Files of a finished store: their records, verification, and random access.

The manifest of a token store or image store contains a checksum of itself and the size and sha256
of every other file. Opening a store checks the manifest and all sizes; before the first example is
read, every file of a local store is compared with its checksum and its declared content. Each error
is one sentence that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import FileRecord, record_of
from flax_transformers.storage.folders import Folder, LocalFolder, RandomFile

DIGEST = "fingerprint"
"""Key of the checksum of all other entries of a manifest."""
_BLOCK = 1 << 25  # bytes read at once; a multiple of every item size
_CACHED = 1 << 21  # bytes checked at once: they stay in a core's cache
_PAGE = 512  # entries read at once by a search
_THREADS = 4
_REQUESTS = 32  # to a bucket at the same time, of a few bytes each


@dataclass(frozen=True)
class Content:
    """The content of a file: ``count`` numbers of ``dtype``, or any number of them.

    ``below``: all are from 0 to less than this. ``last``: they do not decrease, and the last one is
    this (0 if there are none); with ``strictly`` they increase from above 0.
    """

    dtype: str
    count: int | None = None
    below: int | None = None
    last: int | None = None
    strictly: bool = False


Convert = Callable[[dict[str, Any]], dict[str, Any]]
Seen = Callable[[str, np.ndarray], None]
StoreFiles = Mapping[str, tuple[FileRecord, Content]]
"""The files of a store by name."""


def record_json(record: Mapping[str, Any]) -> bytes:
    """A record as JSON; equal records give equal bytes."""
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def digest(record: Mapping[str, Any]) -> str:
    """sha256 of a JSON record."""
    return hashlib.sha256(record_json(record)).hexdigest()


def sealed(body: Mapping[str, Any]) -> bytes:
    """A manifest with its own checksum."""
    return record_json({**body, DIGEST: digest(body)})


@dataclass(frozen=True)
class StoreReader:
    """Checks and reads the files of the store in ``folder``; ``kind`` names it in errors."""

    folder: Folder
    kind: str

    def manifest(
        self,
        name: str,
        format: int,
        converters: Mapping[int, Convert] = MappingProxyType({}),
        also: Sequence[int] = (),
    ) -> dict[str, Any]:
        """A manifest that `sealed` wrote. Raises UserError if it is missing, damaged or of another
        format. ``converters``: from older formats without a checksum to this one. ``also``: older
        formats that need no conversion."""
        try:
            content = self.folder.read(name)
            manifest = json.loads(content)
            found = manifest.get("format")
            intact = _is_intact(manifest, content)
            if isinstance(found, int) and found in converters and DIGEST not in manifest:
                return converters[found](manifest)
        except FileNotFoundError:
            raise UserError(
                f"There is no {self.kind} in {self.folder.path}; prepare one with "
                "`flax-transformers prepare`."
            ) from None
        except OSError as error:
            raise self.unreadable(name, error) from error
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            found, intact = format, False
        if found != format and found not in also:
            raise UserError(
                f"The {self.kind} in {self.folder.path} has format {found}, this version reads "
                f"format {format}; prepare it again in another directory."
            )
        if not intact:
            raise self.damaged(name, "it does not match its own checksum")
        return manifest

    def check_sizes(self, files: StoreFiles) -> None:
        """Compares the sizes of local files with the records, and the records with the counts."""
        for name, (record, content) in files.items():
            size = np.dtype(content.dtype).itemsize
            count = record.bytes // size if content.count is None else content.count
            if record.bytes != count * size:
                raise self.damaged(name, f"{record.bytes} bytes are not {count:,} entries")
            if isinstance(self.folder, LocalFolder):
                self._check_size(name, record.bytes)

    def check_remote_sizes(self, files: StoreFiles) -> None:
        """Compares the sizes of files in a bucket with the records, by one small read of each."""

        def check(name: str) -> None:
            size = files[name][0].bytes
            start = max(0, size - 1)
            try:
                found = len(self.folder.read(name, start))  # one byte, if the size is right
            except FileNotFoundError as error:
                raise self.damaged(name, "it is missing") from error
            if found != size - start:
                wrong = "fewer" if found < size - start else "more"
                raise self.damaged(name, f"it has {wrong} than {size} bytes")

        with ThreadPoolExecutor(_REQUESTS) as threads:
            list(threads.map(check, files))

    def _check_size(self, name: str, expected: int) -> None:
        path = os.path.join(self.folder.path, name)
        try:
            found: int | str = os.path.getsize(path) if os.path.isfile(path) else "no"
        except OSError as error:
            raise self.unreadable(name, error) from error
        if found != expected:
            raise self.damaged(name, f"it has {found} bytes instead of {expected}")

    def check_contents(self, files: StoreFiles) -> None:
        """Reads every file and compares it with its record and its content."""
        for _, error in self.problems(files):
            raise error

    def problems(
        self, files: StoreFiles, seen: Seen | None = None
    ) -> Iterator[tuple[str, UserError]]:
        """(name, error) of damaged files; reads all files.

        ``seen`` is called, by several threads, with the name and the numbers of each block, up to
        the first problem of a file.
        """
        with ThreadPoolExecutor(_THREADS) as threads:
            checks = {
                name: threads.submit(self._check_content, name, *files[name], seen)
                for name in files
            }
            try:
                for name, check in checks.items():
                    try:
                        check.result()
                    except UserError as error:
                        yield name, error
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def _check_content(
        self, name: str, record: FileRecord, content: Content, seen: Seen | None
    ) -> None:
        hashed, position, previous, problem = hashlib.sha256(), 0, 0, ""
        for block in self._cached_blocks(name):
            hashed.update(block)
            position += len(block)
            if not problem and len(block) % np.dtype(content.dtype).itemsize == 0:
                values = np.frombuffer(block, content.dtype)
                problem, previous = _problem(values, content, previous)
                if seen is not None and not problem:
                    seen(name, values)
        if FileRecord(position, hashed.hexdigest()) != record:
            raise self.damaged(name, "it does not match its recorded sha256")
        if not problem and content.last not in (None, previous):
            problem = f"its last entry is {previous} instead of {content.last}"
        if problem:
            raise self.damaged(name, problem)

    def record(self, name: str) -> FileRecord:
        """The present size and sha256 of a file."""
        return record_of(self._blocks(name))

    def _blocks(self, name: str) -> Iterator[bytes]:
        file, position = self._open(name), 0
        while block := self._bytes(file, name, position, position + _BLOCK):
            yield block
            position += len(block)

    def _cached_blocks(self, name: str) -> Iterator[memoryview]:
        for block in self._blocks(name):
            view = memoryview(block)
            for start in range(0, len(view), _CACHED):
                yield view[start : start + _CACHED]

    def array(
        self, name: str, dtype: str | np.dtype, length: int, *, in_memory: bool = False
    ) -> StoreArray:
        """A file as a flat array with random access; with ``in_memory`` it is read at once."""
        file = self._open(name)
        if in_memory:
            size = length * np.dtype(dtype).itemsize
            file = _InMemory(self._bytes(file, name, 0, size))
        return StoreArray(self, name, file, np.dtype(dtype), length)

    def _open(self, name: str) -> RandomFile:
        try:
            return self.folder.open(name)
        except FileNotFoundError as error:
            raise self.damaged(name, "it is missing") from error
        except OSError as error:
            raise self.unreadable(name, error) from error

    def _bytes(self, file: RandomFile, name: str, start: int, stop: int) -> bytes:
        try:
            return file.read(start, stop)
        except FileNotFoundError as error:
            raise self.damaged(name, "it is missing") from error
        except OSError as error:
            raise self.unreadable(name, error) from error

    def exactly(self, file: RandomFile, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises UserError if the file ends before."""
        content = self._bytes(file, name, start, stop)
        if len(content) != stop - start:
            raise self.damaged(name, "it ends too early")
        return content

    def damaged(self, name: str, problem: str) -> UserError:
        """The error for a damaged file."""
        return UserError(
            f"The file {name} of the {self.kind} in {self.folder.path} is damaged; restore it, or "
            f"delete the store and prepare it again ({problem})."
        )

    def unreadable(self, name: str, error: OSError) -> UserError:
        """The error for a file that exists and cannot be read."""
        return UserError(
            f"The file {name} of the {self.kind} in {self.folder.path} cannot be read "
            f"({error.strerror or error}); make it readable, then run the same command again."
        )


def _is_intact(manifest: dict[str, Any], content: bytes) -> bool:
    """Whether a manifest, parsed from ``content``, matches its own checksum."""
    noted = manifest.get(DIGEST)
    rest = content.replace(f' "{DIGEST}": "{noted}",\n'.encode(), b"", 1)
    if hashlib.sha256(rest).hexdigest() == noted:  # faster than serializing it again
        return True
    return noted == digest({key: value for key, value in manifest.items() if key != DIGEST})


class _InMemory:
    """See RandomFile."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, start: int, stop: int) -> bytes:
        return self._content[start:stop]


class StoreArray:
    """A flat array in a file of a store.

    It is not memory-mapped: a truncated file or a failing disk raises a UserError, whereas a
    memory-mapped file would end the process with SIGBUS.
    """

    def __init__(
        self, reader: StoreReader, name: str, file: RandomFile, dtype: np.dtype, length: int
    ) -> None:
        self._reader, self._name, self._file = reader, name, file
        self._dtype, self._length = dtype, length
        self._page_ends: array[int] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        """An entry, or entries [start, stop)."""
        if isinstance(index, slice):
            return self.read(index.start, index.stop)
        return self.read(index, index + 1)[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) as a read-only array."""
        if not 0 <= start <= stop <= self._length:
            raise IndexError(f"entries {start} to {stop} of {self._length} in {self._name}")
        size = self._dtype.itemsize
        content = self._reader.exactly(self._file, self._name, start * size, stop * size)
        return np.frombuffer(content, self._dtype)

    def count_up_to(self, value: int) -> int:
        """Number of entries of an increasing array that are at most ``value``."""
        page = self._page_after(value)
        start = page * _PAGE
        if start >= self._length:
            return self._length
        return start + int(self._page(page).searchsorted(value, "right"))

    def between(self, low: int, high: int) -> np.ndarray:
        """The entries v of an increasing array with low < v <= high."""
        page, found = self._page_after(low), []
        while page * _PAGE < self._length:
            entries = self._page(page)
            first, last = (entries.searchsorted(value, "right") for value in (low, high))
            found.append(entries[first:last])
            if last < len(entries):
                break
            page += 1
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, self._dtype), *found])

    def _page(self, page: int) -> np.ndarray:
        return self.read(page * _PAGE, min((page + 1) * _PAGE, self._length))

    def _page_after(self, value: int) -> int:
        """The first page whose last entry is above ``value``. Last entries are cached, because
        searches read the same ones repeatedly."""
        pages = -(-self._length // _PAGE)
        if self._page_ends is None:
            self._page_ends = array("q", [-1]) * pages  # faster than numpy for single entries
        low, high = 0, pages
        while low < high:
            page = (low + high) // 2
            end = self._page_ends[page]
            if end < 0:
                last = min((page + 1) * _PAGE, self._length) - 1
                end = self._page_ends[page] = int(self[last])
            if end > value:
                high = page
            else:
                low = page + 1
        return low


def _problem(values: np.ndarray, content: Content, previous: int) -> tuple[str, int]:
    """The problem of one block of a file, if any, and its last value."""
    if content.below is not None and len(values):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= content.below:
            wrong = low if low < 0 else high
            return f"it contains {wrong}, but entries are from 0 to {content.below - 1}", previous
    if content.last is not None and len(values):
        steps = np.diff(values, prepend=np.array([previous], values.dtype))
        if (steps < int(content.strictly)).any():
            return "its entries do not increase", previous
        return "", int(values[-1])
    return "", previous
