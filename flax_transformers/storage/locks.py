"""Locks on folders: by the file system on local disks, by a lease in buckets.

A lock on a local disk ends with its process. File systems without locks (some network disks,
Windows) are left unlocked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from etils import epath

from flax_transformers.errors import WorkdirInUse
from flax_transformers.storage.folders import Folder, LocalFolder, writing_below

log = logging.getLogger(__name__)

_NAME = ".lock"
LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long has expired."""


@contextlib.contextmanager
def exclusive_lock(folder: Folder) -> Iterator[None]:
    """Waits until no other process writes in a local folder; removes what killed writers left.

    In a bucket there is no lock: two writers only do the same work twice, because both write the
    same content under temporary names of their own.
    """
    with _folder_lock(folder, shared=False) as local:
        if local is not None:
            local.remove_temporaries()
        try:
            yield
        finally:  # the processes of a killed run may have lived a moment longer
            if local is not None:
                local.remove_temporaries()


@contextlib.contextmanager
def shared_lock(folder: Folder) -> Iterator[None]:
    """For a writer beside others, each with its own files; excludes `exclusive_lock`."""
    with _folder_lock(folder, shared=True):
        yield


@contextlib.contextmanager
def _folder_lock(folder: Folder, *, shared: bool) -> Iterator[LocalFolder | None]:
    """The folder if it is local and locked."""
    if not isinstance(folder, LocalFolder):
        yield None
        return

    def waiting() -> None:
        print(f"Waiting for the process that prepares {folder.path}", file=sys.stderr)

    with writing_below(folder.path):
        os.makedirs(folder.path, exist_ok=True)
        file = open_lock(folder.path)
    with file:
        yield folder if lock_file(file, shared=shared, waiting=waiting) else None


def open_lock(folder: str | os.PathLike[str]) -> IO[str]:
    """Opens the lock file of a local folder. Raises OSError."""
    return open(os.path.join(folder, _NAME), "a")


def lock_file(
    file: IO[str], *, shared: bool = False, waiting: Callable[[], None] | None = None
) -> bool:
    """Locks an open file until it is closed; False where the file system has no locks.

    ``waiting``: called before the call waits for another process. Without it the call raises
    BlockingIOError instead of waiting.
    """
    try:
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            waiting()
            fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def lease(folder: epath.Path, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keeps a second training run out of a folder in a bucket.

    The lease is an object ``.lock`` that its owner rewrites four times in ``seconds``. One that is
    not rewritten for ``seconds`` belonged to a process that was killed, and is taken over; no
    clocks of two machines are compared. Raises WorkdirInUse while another process renews it. Of two
    processes that start at the same moment, the one that wrote first notices at its next renewal
    and sends itself SIGTERM.
    """
    lock = folder / _NAME
    own = {"host": socket.gethostname(), "process": os.getpid(), "namespace": _namespace()}
    own["id"] = uuid.uuid4().hex
    _wait_until_free(lock, seconds)
    stop = threading.Event()

    def renew() -> None:
        renewals, last = 0, time.monotonic()
        while not stop.wait(seconds / 4):
            renewals += 1
            try:
                found = _read(lock)
                if found is not None and found.get("id") != own["id"]:
                    log.error("another process has started to train in %s: stopping", folder)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                lock.write_text(json.dumps(own | {"renewals": renewals}))
                last = time.monotonic()
            except Exception as error:  # each client has errors of its own
                if time.monotonic() - last >= seconds:  # others may regard it as expired by now
                    log.error("%s cannot be renewed (%s): stopping", lock, error)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    lock.write_text(json.dumps(own | {"renewals": 0}))
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(Exception):  # otherwise it expires
            if (_read(lock) or {}).get("id") == own["id"]:
                lock.unlink()


def _wait_until_free(lock: epath.Path, seconds: float) -> None:
    first = _read(lock)
    if first is None or _ended_here(first):
        return
    log.warning("%s exists: waiting %.0f s to see whether its owner renews it", lock, seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 10))
        found = _read(lock)
        if found is None:
            return
        if found != first:
            raise WorkdirInUse(
                f"another process trains in {lock.parent} ({found.get('process')} on "
                f"{found.get('host')}); wait for it, or choose another --workdir"
            )


def _ended_here(owner: dict[str, object]) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    process = owner.get("process")
    here = {"host": socket.gethostname(), "namespace": _namespace()}
    if any(owner.get(name) != value for name, value in here.items()):
        return False
    return isinstance(process, int) and not is_running(process)


def _namespace() -> str:
    """In which process ids have a meaning: not that of a container with the name of its host."""
    if sys.platform != "linux":
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # unknown: equal to none


def process_tag() -> str:
    """This process as a part of a file's name: its id, and a hash of where ids have its meaning."""
    place = hashlib.sha256(f"{socket.gethostname()} {_namespace()}".encode()).hexdigest()[:8]
    return f"{os.getpid()}-{place}"


def has_ended(tag: str) -> bool:
    """Whether the process of a `process_tag` was one of this machine and container, and ended."""
    process, _, place = tag.partition("-")
    here = place == process_tag().partition("-")[2]
    return here and process.isdecimal() and not is_running(int(process))


def is_running(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)  # which does nothing to it
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _read(lock: epath.Path) -> dict[str, object] | None:
    try:
        found = json.loads(lock.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
