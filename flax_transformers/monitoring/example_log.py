"""An audit trail: which examples each step trained on."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from types import TracebackType
from typing import IO, Self

import jax
import numpy as np
from etils import epath

from flax_transformers.storage.paths import is_bucket
from flax_transformers.storage.workdir import read_side_file, write_side_file, writing

log = logging.getLogger(__name__)

_NAME = re.compile(r"ledger-(\d+)\.jsonl")
_FLUSH_SECONDS = 30.0


class ExampleLog:
    """Appends ``{"step": n, "ids": [...]}`` to ``ledger-<process>.jsonl`` in a workdir.

    Opened for a run that goes on after ``start_step``, it drops what an earlier attempt wrote
    beyond. The file appears with the first step written. Objects in a bucket cannot grow: there the
    file is kept here and replaced whole every 30 seconds, at ``flush`` and at the end.
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
            # The first process also looks after those of processes that there are no longer.
            orphan = int(name[1]) >= jax.process_count() and jax.process_index() == 0
            if int(name[1]) == jax.process_index() or orphan:
                kept = _drop_after(path, start_step)
                if is_bucket(path) and path.name == self._path.name:
                    self._lines, self._written = kept, len(kept)

    def write(self, step: int, ids: np.ndarray) -> None:
        """Records the example ids (integers [B]) that this process fed to ``step``."""
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
        """Brings everything written so far into the bucket; on a disk it is there already."""
        self._last_flush = time.monotonic()
        if len(self._lines) > self._written:
            self._path.write_text("".join(self._lines))
            self._written = len(self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk, once more after what was told
                self._file.close()


def _drop_after(path: epath.Path, step: int) -> list[str]:
    lines = (read_side_file(path) or "").splitlines(keepends=True)
    steps = [_step(line) for line in lines]
    # The last one may have been cut off by a kill or a full disk, which is no damage.
    damaged = sum(s < 0 and line.endswith("\n") for line, s in zip(lines, steps, strict=True))
    if damaged:
        log.warning("%s: %d line(s) cannot be read and are left out", path, damaged)
    kept = [line for line, s in zip(lines, steps, strict=True) if 0 <= s <= step]
    write_side_file(path, "".join(kept))
    return kept


def _step(line: str) -> int:
    """-1 for what is no line of a ledger."""
    try:
        row = json.loads(line) if line.endswith("\n") else {}
        step = row["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return step if isinstance(step, int) and isinstance(row.get("ids"), list) else -1
