"""The workdir: the folder or bucket that a run writes to."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from flax_transformers.errors import UserError, WorkdirInUse
from flax_transformers.storage.folders import write_atomically
from flax_transformers.storage.locks import lease, lock_file, open_lock
from flax_transformers.storage.paths import absolute, is_bucket

log = logging.getLogger(__name__)

_SIDE_FILES = re.compile(r"(config\.json|metrics\.jsonl|baselines\.json|ledger-\d+\.jsonl)(\.tmp)?")
_SIDE_FOLDERS = re.compile(r"tokenizer|target_tokenizer|samples|predictions|plots|tensorboard")
_UNSAFE = "[]*?\\"
"""Characters with a meaning in file patterns: orbax does not find its own files with them."""


def open_workdir(path: str | os.PathLike[str]) -> epath.Path:
    """``path`` as an absolute path or URL.

    Raises UserError for a path that cannot be used, such as that of a file, and for a bucket whose
    client is not installed.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("~"):
        raise UserError(f"--workdir {text} names an unknown user; give the whole path")
    if any(character in text for character in _UNSAFE):
        raise UserError(f"--workdir {text} has one of the characters {_UNSAFE}; rename the folder")
    workdir = absolute(text)
    if not is_bucket(workdir):
        for place in (Path(workdir), *Path(workdir).parents):
            if os.path.exists(place) and not os.path.isdir(place):
                below = "is" if place == Path(workdir) else f"is below {place}, which is"
                raise UserError(f"--workdir {text} {below} a file; name a folder")
    return workdir


def check_writable(workdir: epath.Path) -> None:
    """Raises UserError if no folder can be made at, or in, a workdir on a disk; leaves none."""
    if is_bucket(workdir) or jax.process_index() != 0:
        return
    existing = next(place for place in (workdir, *workdir.parents) if os.path.exists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".flax_transformers-", dir=existing):
            pass
    except OSError as error:
        raise _cannot_write(workdir, error) from error


def check_file(path: epath.Path) -> None:
    """Raises UserError if `write_text` could not write a file on a disk; leaves none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if not (is_bucket(path) or _is_device(path)):
        check_writable(epath.Path(os.path.realpath(path)).parent)


def check_unused(workdir: epath.Path) -> None:
    """Raises WorkdirInUse if another process trains in a workdir on a disk; makes no folder."""
    if not is_bucket(workdir) and os.path.isfile(workdir / ".lock"):
        with workdir_lock(workdir):
            pass


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path) -> Iterator[None]:
    """Keeps a second training run out of a workdir.

    Raises WorkdirInUse if another process trains there. Disks without locks are not protected; for
    buckets see `locks.lease`.
    """
    if jax.process_index() != 0:
        yield
        return
    if is_bucket(workdir):
        with lease(workdir):
            yield
        return
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        set_aside_unusable(workdir / ".lock")
        lock = open_lock(workdir)
    except OSError as error:
        raise _cannot_write(workdir, error) from error
    with lock:
        try:
            lock_file(lock)
        except BlockingIOError:
            raise WorkdirInUse(
                f"another process trains in {workdir}; wait for it, or choose another --workdir"
            ) from None
        yield


def clear_side_files(workdir: epath.Path) -> None:
    """Sets aside unusable files that a run writes beside its checkpoints.

    None of them is needed to resume. Buckets have neither folders nor permissions in the way.
    """
    if is_bucket(workdir) or not workdir.is_dir():
        return
    for path in sorted(workdir.iterdir()):
        if _SIDE_FILES.fullmatch(path.name):
            set_aside_unusable(path)
        elif _SIDE_FOLDERS.fullmatch(path.name):
            set_aside_unusable(path, folder=True)


def set_aside_unusable(path: epath.Path, *, folder: bool = False) -> None:
    """Renames `path` if it exists and is not a readable file, or not a readable folder."""
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
        set_aside_file(path, f"cannot be read ({error.strerror or error})")
        return
    if not is_right:
        set_aside_file(path, f"is not a {'folder' if folder else 'file'}")


def set_aside_file(path: epath.Path, reason: str) -> None:
    """Renames a side file to ``NAME.unusable-N`` and logs the reason. Never raises."""
    names = (f"{path.name}.unusable-{number}" for number in itertools.count())
    target = next(path.parent / name for name in names if not (path.parent / name).exists())
    try:
        path.rename(target)
    except Exception as error:  # each client of buckets has errors of its own
        log.warning("%s %s, and cannot be renamed (%s)", path, reason, error)
    else:
        log.warning("%s %s: set aside as %s", path, reason, target.name)


def read_side_file(path: epath.Path) -> str | None:
    """The text of a side file, with invalid UTF-8 replaced; None if it does not exist.

    An unreadable file is set aside. Never raises.
    """
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except Exception as error:  # each client of buckets has errors of its own
        set_aside_file(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")
        return None


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Replaces a file atomically, or the target of a link; writes into a device or a pipe.

    Several processes may write the same file. Raises UserError if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_bucket(path) or _is_device(path):  # /dev/null is not to be replaced
            path.write_bytes(content)
        else:
            write_atomically(os.path.realpath(path), content, lasting=False)


def _is_device(path: epath.Path) -> bool:
    """Whether a path is there and neither a file nor a folder, such as /dev/stdout."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def write_side_file(path: epath.Path, text: str) -> None:
    """Replaces a side file of a run; sets aside what is there if it is not a file.

    Raises UserError if it cannot be written.
    """
    set_aside_unusable(path)
    write_text(path, text)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Turns a failed write into a UserError."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: epath.Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror or error}); free some space or give write "
        "access there, or choose another folder"
    )
