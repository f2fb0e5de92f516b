"""Folders of finished files, on a local disk or in a bucket (gs://, s3://, file://).

Writes are atomic: to a temporary name, synced, renamed (a bucket replaces objects atomically). The
sync can be deferred for files that are verified before they are used. Reads are byte ranges.
Buckets are accessed through tensorstore's key-value store, which needs no cloud SDK. Failed writes
raise UserError, a missing file FileNotFoundError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import socket
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from flax_transformers.errors import UserError

_TEMPORARY = ".tmp-"


class RandomFile(Protocol):
    """A file with random access."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), or fewer at the end of the file. Raises OSError."""


class Folder(Protocol):
    """Interface of LocalFolder and BucketFolder. Names are relative, with "/"."""

    path: str

    def exists(self, name: str) -> bool:
        """Whether the file exists."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop), or fewer at the end of the file."""

    def open(self, name: str) -> RandomFile:
        """The file, for random access."""

    def write(self, name: str, content: Any, *, lasting: bool = True) -> None:
        """Replaces the file atomically by bytes or another buffer. Unless ``lasting``, a power cut
        may damage it until `sync`."""

    def names(self, prefix: str) -> list[str]:
        """Names of the files directly below ``prefix`` (which ends in "/"), sorted."""

    def delete(self, name: str) -> None:
        """Removes the file if it exists."""

    def temporary(self, name: str) -> Path:
        """A local path for this process to write a file that `publish` then moves to its name."""

    def publish(self, temporary: Path, name: str, *, lasting: bool = True) -> None:
        """Moves a finished local file to its name; a ``lasting`` one must be synced already."""

    def sync(self) -> None:
        """Makes all writes durable at once, which is faster than file by file."""


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """A folder, which need not exist yet; scheme://... is a bucket, and ~ the home folder."""
    text = os.path.expanduser(path)
    return BucketFolder(text) if "://" in text else LocalFolder(os.path.abspath(text))


@contextlib.contextmanager
def writing_below(path: str, failure: type[Exception] = OSError) -> Iterator[None]:
    """Turns a failed write below ``path`` into a UserError."""
    try:
        yield
    except failure as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Could not write in {path}: {reason}; free some space or give write access there, or "
            "choose another directory, then run the same command again to resume."
        ) from error


def write_atomically(
    path: str | os.PathLike[str],
    content: Any,
    *,
    temporary: str | os.PathLike[str] | None = None,
    lasting: bool = True,
    replace: bool = True,
) -> None:
    """Writes a local file as a whole, from bytes, another buffer or an iterator of buffers. Raises
    OSError.

    ``temporary``: where it is written first, in the same file system; default: beside it, under a
    name of this process's own, so that others may write the file too. ``lasting``: sync it, so that
    it survives a power cut. ``replace``: whether a file that exists is replaced.
    """
    first = _temporary(path) if temporary is None else temporary
    try:
        with open(first, "wb") as file:
            file.writelines(content if isinstance(content, Iterator) else [content])
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(first, path)
        else:
            _move_if_absent(first, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(first)
        raise
    if lasting:
        _sync_folder(os.path.dirname(path) or ".")


def _temporary(path: str | os.PathLike[str]) -> str:
    return f"{os.fspath(path)}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}"


def _move_if_absent(first: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Moves a file to ``path``, or removes it if another one is there."""
    try:
        os.link(first, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(first, path)
        return
    os.remove(first)


def _sync_folder(path: str | os.PathLike[str], *, contents: bool = False) -> None:
    """Makes new names in a folder durable; with ``contents``, all writes to its file system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if contents:
            _sync_file_system(descriptor)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OPEN_FILES = 256
"""Limit of open files per process: a store has a few files for each of thousands of shards."""
_open_files: deque[weakref.ref[LocalFile]] = deque()


class _Descriptor:
    """An open file that closes when it is no longer referenced."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalFile:
    """See RandomFile. Closed when many others are opened, and reopened when it is read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._descriptor: _Descriptor | None = None
        self._open()

    def _open(self) -> _Descriptor:
        descriptor = _Descriptor(self._path)
        stat = os.fstat(descriptor.number)
        identity = stat.st_dev, stat.st_ino
        if self._identity not in (None, identity):
            raise OSError(errno.ESTALE, "it was replaced by another file")
        self._identity, self._descriptor = identity, descriptor
        _open_files.append(weakref.ref(self))
        while len(_open_files) > _OPEN_FILES:
            oldest = _open_files.popleft()()
            if oldest is not None and oldest is not self:
                oldest._descriptor = None
        return descriptor

    def read(self, start: int, stop: int) -> bytes:
        descriptor = self._descriptor or self._open()  # stays open until the end of this call
        content = os.pread(descriptor.number, stop - start, start)
        while content and len(content) < stop - start:  # one call gives at most 2 GiB
            at = start + len(content)
            more = os.pread(descriptor.number, stop - at, at)
            if not more:
                break
            content += more
        return content


class LocalFolder:
    """See Folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def exists(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.path, name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(os.path.join(self.path, name), "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    def open(self, name: str) -> LocalFile:
        return LocalFile(os.path.join(self.path, name))

    def write(self, name: str, content: Any, *, lasting: bool = True, replace: bool = True) -> None:
        """See Folder. Unless ``replace``, a file that exists is left as it is, because other
        processes may be reading it. ``content`` may be an iterator of buffers."""
        with writing_below(self.path):
            path, first = os.path.join(self.path, name), self.temporary(name)
            write_atomically(path, content, temporary=first, lasting=lasting, replace=replace)

    def names(self, prefix: str) -> list[str]:
        root = Path(self.path, prefix)
        found = root.iterdir() if root.is_dir() else ()
        return sorted(prefix + path.name for path in found if path.is_file())

    def delete(self, name: str) -> None:
        with writing_below(self.path), contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.path, name))

    def temporary(self, name: str) -> Path:
        path = Path(_temporary(os.path.join(self.path, name)))
        with writing_below(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, temporary: Path, name: str, *, lasting: bool = True) -> None:
        with writing_below(self.path):
            target = Path(self.path, name)
            os.replace(temporary, target)
            if lasting:
                _sync_folder(target.parent)

    def sync(self) -> None:
        with writing_below(self.path):
            _sync_folder(self.path, contents=True)

    def remove_temporaries(self) -> None:
        """Removes what killed writers left. No other process of this machine may be writing.

        A process of another machine may write without our seeing its lock: its files are kept for a
        week.
        """
        own, long_ago = f"{_TEMPORARY}{socket.gethostname()}-", time.time() - 7 * 24 * 3600
        for path in Path(self.path).rglob(f"*{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and (own in path.name or path.stat().st_mtime < long_ago):
                    path.unlink()


def _sync_file_system(descriptor: int) -> None:
    """Writes to disk what the file system of an open file has in memory."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:  # not Linux
        os.sync()
    elif syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def kvstore_spec(url: str) -> Any:
    """``url`` for tensorstore, which itself ignores AWS_ENDPOINT_URL."""
    end_point = os.environ.get("AWS_ENDPOINT_URL")
    if not end_point or not url.startswith("s3://"):
        return url
    bucket, _, path = url.removeprefix("s3://").partition("/")
    return {
        "driver": "s3",
        "bucket": bucket,
        "path": path,
        "endpoint": end_point,
        "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
    }


def _cannot_read(path: str, error: ValueError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error}); check its name, your access and the network, then run "
        "the same command again"
    )


class BucketFolder:
    """See Folder. Opened on first use, so that it can be pickled. tensorstore raises ValueError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @functools.cached_property
    def _store(self) -> Any:
        import tensorstore  # slow to import, and for buckets only

        try:
            return tensorstore.KvStore.open(kvstore_spec(self.path.rstrip("/") + "/")).result()
        except ValueError as error:
            raise _cannot_read(self.path, error) from error

    def exists(self, name: str) -> bool:
        try:
            self.read(name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            found = self._read(name, start, stop)
        except ValueError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise _cannot_read(f"{self.path}/{name}", error) from error
            return b"" if stop is None else self.read(name, start)[: stop - start]
        if found.state != "value":
            raise FileNotFoundError(f"{self.path}/{name}")
        return bytes(found.value)

    def _read(self, name: str, start: int, stop: int | None) -> Any:
        whole = start == 0 and stop is None  # an empty file has no valid range
        return self._store.read(name, byte_range=None if whole else slice(start, stop)).result()

    def open(self, name: str) -> _BucketFile:
        return _BucketFile(self, name)

    def write(self, name: str, content: Any, *, lasting: bool = True) -> None:
        with writing_below(self.path, ValueError):
            self._store.write(name, bytes(content)).result()

    def names(self, prefix: str) -> list[str]:
        end = prefix[:-1] + chr(ord("/") + 1)
        found = self._store.list(type(self._store).KeyRange(prefix, end)).result()
        return sorted(name for name in map(bytes.decode, found) if "/" not in name[len(prefix) :])

    def delete(self, name: str) -> None:
        with writing_below(self.path, ValueError):
            self._store.write(name, None).result()

    def temporary(self, name: str) -> Path:
        handle, path = tempfile.mkstemp(suffix="-" + name.replace("/", "-"))
        os.close(handle)
        return Path(path)

    def sync(self) -> None:
        """Objects are durable as soon as they are written."""

    def publish(self, temporary: Path, name: str, *, lasting: bool = True) -> None:
        try:
            self.write(name, temporary.read_bytes())
        finally:
            temporary.unlink(missing_ok=True)


class _BucketFile:
    """See RandomFile."""

    def __init__(self, folder: BucketFolder, name: str) -> None:
        self._folder, self._name = folder, name

    def read(self, start: int, stop: int) -> bytes:
        return self._folder.read(self._name, start, stop)
