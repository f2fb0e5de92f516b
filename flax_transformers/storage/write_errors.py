"""A write or read of a checkpoint that failed, said once and in one sentence."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, NoReturn

from etils import epath

from flax_transformers.errors import UserError

# What a failing file system says, in Python or through tensorstore, and what to do about it.
_STORAGE_SIGNS = {
    "No space left on device": "free some space or lower checkpoints.keep_latest",
    "Disk quota exceeded": "free some space or lower checkpoints.keep_latest",
    "File too large": "raise the limit on the size of files (ulimit -f)",
    "Read-only file system": "make it writable",
    "Permission denied": "make it writable",
    "Input/output error": "check the disk",
    "Stale file handle": "mount it again",
}


def raise_write_error(error: Exception, directory: epath.Path) -> NoReturn:
    """As a UserError if the storage is at fault, otherwise as it is."""
    sign = _storage_sign(error)
    if sign is None:
        raise error
    raise UserError(
        f"a checkpoint could not be written to {directory} ({sign}); earlier ones are intact: "
        f"{_STORAGE_SIGNS[sign]}, and run the same command again to go on from the last of them"
    ) from error


def raise_read_error(error: Exception, folder: epath.Path) -> NoReturn:
    """As `raise_write_error`, for a checkpoint that passed its check and then could not be read."""
    sign = _storage_sign(error)
    if sign is None:
        raise error
    raise UserError(
        f"checkpoint {folder} cannot be read ({sign}); nothing was changed: make it readable, or "
        "wait until the storage is back, and run the same command again"
    ) from error


def _storage_sign(error: Exception) -> str | None:
    """What the storage says in an error or in its causes, if it is at fault."""
    chain = ""
    seen: BaseException | None = error
    while seen is not None:
        chain, seen = f"{chain} {seen}", seen.__cause__ or seen.__context__
    return next((sign for sign in _STORAGE_SIGNS if sign.lower() in chain.lower()), None)


@functools.cache
def report_failed_writes_once() -> None:
    """Silences the tracebacks printed where a write fails; `Checkpoints` raises the error itself.

    Orbax logs it from several threads, and tensorstore adds one for each write still under way.
    """

    def not_from_orbax(record: logging.LogRecord) -> bool:
        trace = record.exc_info[2] if record.exc_info else None
        return trace is None or "orbax" not in trace.tb_frame.f_code.co_filename

    logging.getLogger("absl").addFilter(not_from_orbax)
    other_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            other_hook(unraisable)

    sys.unraisablehook = hook
