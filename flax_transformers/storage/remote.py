"""Workdirs in buckets: whether their client is here, and what a lock is where files have none."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.storage.s3 import teach_orbax

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""A lock that nobody has renewed for so long is free."""


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a URL rather than a file's name."""
    return "://" in os.fspath(path)


def bucket_path(url: str | os.PathLike[str]) -> epath.Path:
    """``url`` as a path. Raises UserError for what is neither gs:// nor s3://, if the client is not
    installed, or if nothing can be reached there."""
    text = os.fspath(url).rstrip("/")
    if not text.startswith(("gs://", "s3://")):
        raise UserError(f"{text} cannot be reached; a workdir is a folder, or in gs:// or s3://")
    try:
        import fsspec

        # Orbax writes past this client, which would go on listing what was there before.
        for client in ("gcs", "gs", "s3"):
            fsspec.config.conf.setdefault(client, {})["use_listings_cache"] = False
        folder = epath.Path(text)
        folder.exists()
        bucket = text.removeprefix("s3://").partition("/")[0]
        if text.startswith("s3://") and not epath.Path(f"s3://{bucket}").exists():
            # Its client would make a bucket of that name.
            raise FileNotFoundError("there is no such bucket")
    except ImportError as error:
        raise UserError(
            f"{text} cannot be reached ({error}); run pip install 'flax-transformers[buckets]'"
        ) from error
    except Exception as error:  # each client has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{text} cannot be reached ({reason}); check its name and your access, or use a local "
            "folder"
        ) from error
    if text.startswith("s3://"):
        teach_orbax()
    return folder


@contextlib.contextmanager
def leased(folder: epath.Path, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keeps a second training out of ``folder`` while this one goes on.

    The lock is an object ``.lock`` that its owner rewrites four times in ``seconds``. One that
    stands still for ``seconds`` belonged to a process that was killed, and is taken over; so no two
    clocks are compared. Raises UserError while another process renews it. Of two processes that
    start in the same moment the one that wrote first finds out at its next renewal, and asks itself
    to stop by SIGTERM.
    """
    lock = folder / ".lock"
    own = {"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex}
    _wait_until_free(lock, seconds)
    stop = threading.Event()

    def renew() -> None:
        renewals, last = 0, time.monotonic()
        while not stop.wait(seconds / 4):
            renewals += 1
            try:
                found = _read(lock)
                if found is not None and found.get("id") != own["id"]:
                    log.error("another process has begun to train in %s: stopping", folder)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                lock.write_text(json.dumps(own | {"renewals": renewals}))
                last = time.monotonic()
            except Exception as error:  # each client has errors of its own
                if time.monotonic() - last >= seconds:  # others may hold it to be free by now
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
        with contextlib.suppress(Exception):  # it is free in a minute all the same
            if (_read(lock) or {}).get("id") == own["id"]:
                lock.unlink()


def _wait_until_free(lock: epath.Path, seconds: float) -> None:
    first = _read(lock)
    if first is None or _ended_here(first):
        return
    log.warning("%s is there: seeing for %.0f s whether its owner is alive", lock, seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 10))
        found = _read(lock)
        if found is None:
            return
        if found != first:
            raise UserError(
                f"another process trains in {lock.parent} ({found.get('process')} on "
                f"{found.get('host')}); wait for it, or choose another --workdir"
            )


def _ended_here(owner: dict[str, object]) -> bool:
    """Whether the owner was a process of this machine that is no longer there."""
    process = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _read(lock: epath.Path) -> dict[str, object] | None:
    try:
        found = json.loads(lock.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
