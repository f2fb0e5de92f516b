"""The folder, or bucket, that holds all that a run writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.training.buckets import bucket_path, is_bucket, leased

_UNSAFE = "[]*?\\"
"""Characters that file patterns give a meaning to; orbax then does not find its own files."""


def open_workdir(path: str | os.PathLike[str]) -> epath.Path:
    """``path`` as one absolute path or URL, for everything that follows.

    Raises UserError for a path that cannot be used, or a bucket whose client is not installed.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("~"):
        raise UserError(f"--workdir {text} names a user that is not there; give the whole path")
    if any(character in text for character in _UNSAFE):
        raise UserError(f"--workdir {text} has one of the characters {_UNSAFE}; rename the folder")
    return bucket_path(text) if is_bucket(text) else epath.Path(os.path.abspath(text))


@contextlib.contextmanager
def only_one(workdir: epath.Path) -> Iterator[None]:
    """Keeps a second training out of a workdir while this one goes on.

    Raises UserError if another process trains there. Disks without locks are left unguarded; in a
    bucket, see `buckets.leased`.
    """
    if jax.process_index() != 0:
        yield
        return
    if is_bucket(workdir):
        with leased(workdir):
            yield
        return
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        lock = open(Path(workdir) / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _cannot_write(workdir, error) from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process trains in {workdir}; wait for it, or choose another --workdir"
            ) from None
        except (ImportError, OSError):
            pass
        yield


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a file in one go. Raises UserError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_bucket(path):
            path.write_text(text)
        else:
            temporary.write_text(text)
            temporary.replace(path)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Turns a failed write into a UserError."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: epath.Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror or error}); make room there or choose another "
        "--workdir"
    )
