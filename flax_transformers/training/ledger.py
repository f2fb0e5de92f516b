"""An audit trail: which examples each step trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import jax
import numpy as np
from etils import epath


class Ledger:
    """Appends ``{"step": n, "ids": [...]}`` to ``ledger-<process>.jsonl`` in a local workdir.

    Opened for a run that goes on after ``start_step``, it drops what an earlier attempt wrote
    beyond. The file appears with the first step written.
    """

    def __init__(self, workdir: epath.Path, start_step: int) -> None:
        self._path = Path(workdir) / f"ledger-{jax.process_index()}.jsonl"
        self._file: IO[str] | None = None
        for path in Path(workdir).glob("ledger-*.jsonl"):
            process = int(path.stem.removeprefix("ledger-"))
            # The first process also looks after those of processes that there are no longer.
            orphan = process >= jax.process_count() and jax.process_index() == 0
            if process == jax.process_index() or orphan:
                _drop_after(path, start_step)

    def write(self, step: int, ids: np.ndarray) -> None:
        """Records the example ids (integers [B]) that this process fed to ``step``."""
        if self._file is None:
            self._file = open(self._path, "a")  # noqa: SIM115 (closed by __exit__)
        self._file.write(json.dumps({"step": step, "ids": ids.tolist()}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _drop_after(path: Path, step: int) -> None:
    kept = [
        line
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] <= step
    ]
    path.write_text("".join(kept))
