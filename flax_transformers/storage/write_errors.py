"""Failed writes and reads of checkpoints, reported once and in one sentence."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, NoReturn

from etils import epath

from flax_transformers.errors import UserError

# Messages of failing file systems, from Python or tensorstore, and what to do.
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
    """Raises UserError if the storage caused the error, otherwise the error itself."""
    sign = _storage_sign(error)
    raise UserError(
        f"a checkpoint could not be written to {directory} ({sign}); earlier ones are intact: "
        f"{_STORAGE_SIGNS[sign]}, and run the same command again to resume from the newest of them"
    ) from error


def raise_read_error(error: Exception, folder: epath.Path) -> NoReturn:
    """As `raise_write_error`, for a verified checkpoint that then could not be read."""
    sign = _storage_sign(error)
    raise UserError(
        f"checkpoint {folder} cannot be read ({sign}); nothing was changed: make it readable, or "
        "wait until the storage is back, and run the same command again"
    ) from error


def _storage_sign(error: Exception) -> str:
    """The message of the storage in an error or its causes; raises an error without one."""
    chain = ""
    seen: BaseException | None = error
    while seen is not None:
        chain, seen = f"{chain} {seen}", seen.__cause__ or seen.__context__
    for sign in _STORAGE_SIGNS:
        if sign.lower() in chain.lower():
            return sign
    raise error


@functools.cache
def report_failed_writes_once() -> None:
    """Silences the tracebacks of a failed write; `Checkpoints` raises the error itself.

    Orbax logs it from several threads, and tensorstore for each pending write.
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
