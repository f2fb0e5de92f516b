"""The sinks in every workdir: metrics.jsonl and TensorBoard's event files."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TextIO

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import FILE_NAME, metrics_up_to
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.storage.folders import write_atomically
from flax_transformers.storage.paths import is_bucket

FLUSH_SECONDS = 30.0


class _FileSink(MetricSink):
    """A sink that writes into a workdir. Raises UserError if that fails, and then stops writing."""

    name: ClassVar[str]
    """Of its file or folder in the workdir."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start_step: int = 0,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self._path, self._start_step = epath.Path(workdir) / self.name, start_step
        self._flush_seconds = flush_seconds
        self._begin()

    def _begin(self) -> None:
        self._last_flush, self._is_open = time.monotonic(), True
        with self._writing():
            self._open()

    def __enter__(self) -> Self:
        if not self._is_open:
            self._begin()
        return self

    def _open(self) -> None: ...
    def _append(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def _sync(self) -> None: ...
    def _release(self) -> None: ...

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row of host numbers (Python or numpy scalars)."""
        if not self._is_open:
            return
        with self._writing():
            self._append(int(step), metrics)
        self._start_step = int(step)  # where it opens again
        if time.monotonic() - self._last_flush >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes everything out to the disk or the bucket."""
        if self._is_open:
            self._last_flush = time.monotonic()
            with self._writing():
                self._sync()

    def close(self) -> None:
        """Flushes; nothing is written after it until it is entered again."""
        if self._is_open:
            self.flush()
            self._stop()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stop()
            raise UserError(
                f"metrics cannot be written to {self._path} ({error.strerror or error}); free "
                "space there or choose another workdir that can be written."
            ) from error

    def _stop(self) -> None:
        self._is_open = False
        with contextlib.suppress(OSError):  # closing a file on a full disk fails once more
            self._release()


class JsonLines(_FileSink):
    """metrics.jsonl in the workdir (see ``metrics``).

    Rows beyond ``start_step`` are dropped, so that the curves are those of one uninterrupted run;
    with ``start_step`` 0 all are. Each row is appended to a local file at once. Objects in a bucket
    cannot be appended to: the whole file is replaced every ``flush_seconds``, at ``flush`` and at
    ``close``.
    """

    name = FILE_NAME
    _file: TextIO | None = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = metrics_up_to(self._path, self._start_step)
        if is_bucket(self._path):
            self._sync()
        else:
            first = f"{self._path}.tmp"  # one name, as a workdir is locked: no kill adds a file
            write_atomically(self._path, "".join(self._lines).encode(), temporary=first)
            self._file = open(self._path, "a")  # noqa: SIM115 (closed by _release)

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        row |= {name: _json_number(value) for name, value in metrics.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)
            self._file.flush()

    def _sync(self) -> None:
        if self._file is None:
            self._path.write_text("".join(self._lines))
        else:
            os.fsync(self._file.fileno())

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard(_FileSink):
    """TensorBoard event files in ``tensorboard/`` of the workdir, written without threads.

    Events beyond ``start_step`` of an interrupted run are hidden. tensorboardX's own SummaryWriter
    hands events to a thread that dies on a full disk, after which its bounded queue would block the
    training loop. For a bucket the file grows in a temporary folder and is copied at each flush.
    """

    name = "tensorboard"
    _temporary: tempfile.TemporaryDirectory[str] | None = None
    _writer: EventsWriter | None = None

    def _open(self) -> None:
        if is_bucket(self._path):
            self._temporary = tempfile.TemporaryDirectory(prefix="tensorboard_")
        self._local = Path(self._temporary.name if self._temporary else self._path)
        self._path.mkdir(parents=True, exist_ok=True)
        # tensorboardX names files by second and host; the step keeps quick restarts apart.
        suffix = f".step{self._start_step:010d}"
        self._writer = EventsWriter(str(self._local / "events"), filename_suffix=suffix)
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
        purge_from = self._start_step + 1 if self._start_step else 0
        self._write(event_pb2.Event(wall_time=time.time(), step=purge_from, session_log=restart))
        self._sync()

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        scalars = [
            summary_pb2.Summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
        ]
        summary = summary_pb2.Summary(value=scalars)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        assert self._writer is not None
        self._writer.write_event(event)

    def _sync(self) -> None:
        assert self._writer is not None
        self._writer.flush()
        if self._temporary is not None:
            for file in self._local.iterdir():
                (self._path / file.name).write_bytes(file.read_bytes())

    def _release(self) -> None:
        writer, self._writer = self._writer, None
        temporary, self._temporary = self._temporary, None
        if writer is not None:
            writer.close()
        if temporary is not None:
            temporary.cleanup()


def _json_number(value: Any) -> int | float | None:
    """Integers unchanged, other numbers in the shortest form of a float32: 6.1, not 6.0999999."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    with np.errstate(over="ignore"):
        small = np.float32(value)
    return float(str(small)) if np.isfinite(small) else None
