"""What a process of a job is made to do wrong from within, by an environment variable each.

To add one: a function of the variable's value, which replaces something of the package in the
process that is about to run the command, and a line in HOOKS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def _batches_with_nan(value: str) -> None:
    """``7:12``: batches 7 to 11 of the stream are NaN."""
    from flax_transformers.testing import batches_with_nan
    from flax_transformers.training import loop

    first, last = map(int, value.split(":"))
    loop.batches_on_mesh = batches_with_nan(range(first, last))


def _unreadable(value: str) -> None:
    """``13:checkpoints/60/``: hashing a file whose path has that in it fails with errno 13."""
    from flax_transformers.training import digests

    number, _, part = value.partition(":")
    hash_file = digests._hash_file

    def failing(path: Any) -> Any:
        if part in os.fspath(path):
            raise OSError(int(number), os.strerror(int(number)), os.fspath(path))
        return hash_file(path)

    digests._hash_file = failing


HOOKS: dict[str, Callable[[str], None]] = {
    "CRASH_NAN": _batches_with_nan,
    "CRASH_UNREADABLE": _unreadable,
}
