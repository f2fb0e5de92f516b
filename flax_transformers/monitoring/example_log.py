"""A log of the examples that each step was trained on."""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import IO, Self

import jax
import numpy as np
from etils import epath

from flax_transformers.monitoring.metrics import lines_up_to
from flax_transformers.storage.paths import is_bucket
from flax_transformers.storage.workdir import write_side_file, writing

_NAME = re.compile(r"ledger-(\d+)\.jsonl")
_FLUSH_SECONDS = 30.0


class ExampleLog:
    """Appends ``{"step": n, "ids": [...]}`` to ``ledger-<process>.jsonl`` in a workdir.

    For a run that resumes after ``start_step``, the lines of later steps are dropped. The file is
    created when the first step is written. Objects in a bucket cannot be appended to: there the
    whole file is replaced every 30 seconds, at ``flush`` and at the end.
    """

    def __init__(self, workdir: epath.Path, start_step: int) -> None:
        self._path = workdir / f"ledger-{jax.process_index()}.jsonl"
        self._file: IO[str] | None = None
        self._lines: list[str] = []
        self._written, self._last_flush = 0, time.monotonic()
        for path in workdir.iterdir() if workdir.exists() else ():
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            # Process 0 also shortens the files of processes that no longer exist.
            orphan = int(name[1]) >= jax.process_count() and jax.process_index() == 0
            if int(name[1]) == jax.process_index() or orphan:
                kept = _drop_after(path, start_step)
                if is_bucket(path) and path.name == self._path.name:
                    self._lines, self._written = kept, len(kept)

    def write(self, step: int, ids: np.ndarray) -> None:
        """Records the example ids, integers [B], of this process in ``step``."""
        line = json.dumps({"step": step, "ids": ids.tolist()}) + "\n"
        if is_bucket(self._path):
            self._lines.append(line)
            if time.monotonic() - self._last_flush >= _FLUSH_SECONDS:
                self.flush()
            return
        with writing(self._path):
            if self._file is None:
                self._file = open(self._path, "a")  # noqa: SIM115 (closed by __exit__)
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Writes everything out to a bucket; a local file is complete already."""
        self._last_flush = time.monotonic()
        if len(self._lines) > self._written:
            self._path.write_text("".join(self._lines))
            self._written = len(self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which was reported already
                self._file.close()


def _drop_after(path: epath.Path, step: int) -> list[str]:
    kept = lines_up_to(path, step, _step)
    write_side_file(path, "".join(kept))
    return kept


def _step(line: str) -> int | None:
    """The step of a line; None for a damaged line."""
    try:
        row = json.loads(line) if line.endswith("\n") else {}
        step = row["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_whole = isinstance(step, int) and step >= 0 and isinstance(row.get("ids"), list)
    return step if is_whole else None
