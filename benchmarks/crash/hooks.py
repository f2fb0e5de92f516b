"""Faults inside a process of a job, each set by an environment variable.

To add one, write a function of the variable's value that replaces part of the package in the
process that will run the command, and add a line to HOOKS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def _batches_with_nan(value: str) -> None:
    """``7:12``: batches 7 to 11 of the stream are NaN."""
    from flax_transformers.testing import batches_with_nan
    from flax_transformers.training import resume

    first, last = map(int, value.split(":"))
    resume.batches_on_mesh = batches_with_nan(range(first, last))


def _unreadable(value: str) -> None:
    """``13:checkpoints/60/``: hashing a file whose path contains that text fails with errno 13."""
    from flax_transformers.storage import checksums

    number, _, part = value.partition(":")
    hash_file = checksums._hash_file

    def failing(path: Any) -> Any:
        if part in os.fspath(path):
            raise OSError(int(number), os.strerror(int(number)), os.fspath(path))
        return hash_file(path)

    checksums._hash_file = failing


def _sleep(value: str) -> None:
    """``1:30``: process 1 sleeps without end in data loading, at its 30th example."""
    from flax_transformers.data.pipeline import loader as pipeline

    index, _, example = value.partition(":")
    prepare = pipeline._Prepare.__call__
    seen = 0

    def sleeping(self: Any, place: int, number: int) -> Any:
        nonlocal seen
        seen += 1
        if seen == int(example):
            print("sleeps in data loading", flush=True)
            time.sleep(100_000)
        return prepare(self, place, number)

    if os.environ.get("JAX_PROCESS_ID", "0") == index:
        pipeline._Prepare.__call__ = sleeping  # type: ignore[method-assign]


def _absent(value: str) -> None:
    """``1``: process 1 ends before it joins the others."""
    if os.environ["JAX_PROCESS_ID"] == value:
        os._exit(0)


HOOKS: dict[str, Callable[[str], None]] = {
    "CRASH_NAN": _batches_with_nan,
    "CRASH_UNREADABLE": _unreadable,
    "CRASH_SLEEP": _sleep,
    "CRASH_ABSENT": _absent,
}
