"""The folder, or bucket, that holds all that a run writes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.storage.remote import bucket_path, is_bucket, leased

log = logging.getLogger(__name__)

_SIDE_FILES = re.compile(r"(config\.json|metrics\.jsonl|baselines\.json|ledger-\d+\.jsonl)(\.tmp)?")
_SIDE_FOLDERS = re.compile(r"tokenizer|target_tokenizer|samples|predictions|plots|tensorboard")
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
def exclusive_lock(workdir: epath.Path) -> Iterator[None]:
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
        set_aside_unusable(workdir / ".lock")
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


def clear_side_files(workdir: epath.Path) -> None:
    """Sets aside what is unusable of all that a run writes beside its checkpoints.

    None of it is needed to resume. In a bucket there are neither folders nor permissions to be in
    the way.
    """
    if is_bucket(workdir) or not workdir.is_dir():
        return
    for path in sorted(workdir.iterdir()):
        if _SIDE_FILES.fullmatch(path.name):
            set_aside_unusable(path)
        elif _SIDE_FOLDERS.fullmatch(path.name):
            set_aside_unusable(path, folder=True)


def set_aside_unusable(path: epath.Path, *, folder: bool = False) -> None:
    """Renames `path` if it is there and is no readable file, or no readable folder."""
    if is_bucket(path) or not os.path.lexists(path):
        return
    try:
        is_right = (stat.S_ISDIR if folder else stat.S_ISREG)(os.stat(path).st_mode)
        if is_right and folder:
            os.listdir(path)
        elif is_right:
            with open(path, "rb") as file:
                file.read(1)
    except OSError as error:
        set_aside(path, f"cannot be read ({error.strerror or error})")
        return
    if not is_right:
        set_aside(path, f"is no {'folder' if folder else 'file'}")


def set_aside(path: epath.Path, reason: str) -> None:
    """Renames a side file to ``NAME.unusable-N``, and says why. Never raises."""
    names = (f"{path.name}.unusable-{number}" for number in itertools.count())
    target = next(path.parent / name for name in names if not (path.parent / name).exists())
    try:
        path.rename(target)
    except Exception as error:  # each client of buckets has errors of its own
        log.warning("%s %s, and cannot be renamed (%s)", path, reason, error)
    else:
        log.warning("%s %s: set aside as %s", path, reason, target.name)


def read_side_file(path: epath.Path) -> str | None:
    """The text of a side file, what is not UTF-8 replaced; None if there is none.

    One that cannot be read is set aside. Never raises.
    """
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except Exception as error:  # each client of buckets has errors of its own
        set_aside(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")
        return None


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
