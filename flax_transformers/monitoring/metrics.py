"""Scalars over time: metrics.jsonl and TensorBoard events in the workdir, and means over steps.

metrics.jsonl holds one row per line, ``{"step": 120, "time": 1767225600.0, "train/loss": 6.1}``,
``time`` in seconds since 1970. A number that is not finite is written as null (JSON has no NaN);
the TensorBoard events keep the real one. Read it with ``read_metrics`` or
``pandas.read_json(path, lines=True)``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import jax
import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from flax_transformers.errors import UserError
from flax_transformers.storage.paths import is_bucket
from flax_transformers.storage.workdir import read_side_file

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"

Totals = Mapping[str, tuple[float, float]]
"""Metric name to (sum, count), on the host."""


class MetricsWriter:
    """Writes rows of scalars for a run that starts, or goes on, after ``start_step``.

    What an earlier attempt wrote beyond ``start_step`` is dropped from metrics.jsonl and hidden in
    TensorBoard, so that the curves are those of one uninterrupted run; with ``start_step`` 0
    everything is. With ``enabled`` False (every process but one) nothing is read or written.

    A local metrics.jsonl grows by one line per row, at once readable by others; TensorBoard's file
    follows every ``flush_seconds``. Objects in a bucket cannot grow: there both files are kept here
    and replaced whole every ``flush_seconds``, at ``flush`` and at ``close``.

    Raises UserError where the workdir cannot be written; after that it writes nothing more.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        enabled: bool = True,
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        flush_seconds: float = 30.0,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._path = epath.Path(workdir) / FILE_NAME
        self._flush_seconds = flush_seconds
        self._last_flush = time.monotonic()
        self._appended: TextIO | None = None
        self._open: list[TextIO | _Events] = []
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = _kept_lines(self._path, start_step)
            _replace(self._path, "".join(self._lines))
            if not is_bucket(self._path):
                self._appended = open(self._path, "a")  # noqa: SIM115 (closed by _release)
                self._open.append(self._appended)
            self._events: _Events | None = None
            if tensorboard:
                self._events = _Events(epath.Path(workdir) / "tensorboard", start_step)
                self._open.append(self._events)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row of host numbers (Python or numpy scalars) for the state after ``step``."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        row: dict[str, float | None] = {"step": int(step), "time": round(now, 3)}
        row |= {name: _json_number(value) for name, value in metrics.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._writing():
            if self._appended is None:
                self._lines.append(line)
            else:
                self._appended.write(line)
                self._appended.flush()
            if self._events is not None:
                self._events.write(step, now, values)
        if time.monotonic() - self._last_flush >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Brings everything written so far onto the disk or into the bucket."""
        if not self._enabled:
            return
        self._last_flush = time.monotonic()
        with self._writing():
            if self._appended is None:
                _replace(self._path, "".join(self._lines))
            else:
                os.fsync(self._appended.fileno())
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Flushes; the writer is not used after it."""
        if not self._enabled:
            return
        self.flush()
        self._release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an operating system's error into the user's sentence, and gives up writing."""
        try:
            yield
        except OSError as error:
            self._release()
            raise _cannot_write(self._path, error) from error

    def _release(self) -> None:
        self._enabled = False
        for file in self._open:
            # On a full disk closing fails once more, after the error that is told.
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Events:
    """One TensorBoard event file, written without threads.

    tensorboardX's own SummaryWriter hands events to a thread that dies on a full disk, after which
    its bounded queue would stop the training loop for good. For a bucket the file grows in a
    temporary folder and is copied over at each flush.
    """

    def __init__(self, directory: epath.Path, start_step: int) -> None:
        self._directory, self._temporary = directory, None
        if is_bucket(directory):
            self._temporary = tempfile.TemporaryDirectory(prefix="tensorboard_")
        self._local = Path(self._temporary.name if self._temporary else directory)
        directory.mkdir(parents=True, exist_ok=True)
        # tensorboardX names files by second and host; the step keeps quick restarts apart.
        suffix = f".step{start_step:010d}"
        self._writer = EventsWriter(str(self._local / "events"), filename_suffix=suffix)
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
        purge_from = start_step + 1 if start_step else 0
        self._writer.write_event(
            event_pb2.Event(wall_time=time.time(), step=purge_from, session_log=restart)
        )
        self.flush()

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        scalars = [summary_pb2.Summary.Value(tag=n, simple_value=v) for n, v in values.items()]
        summary = summary_pb2.Summary(value=scalars)
        self._writer.write_event(event_pb2.Event(wall_time=now, step=int(step), summary=summary))

    def flush(self) -> None:
        self._writer.flush()
        if self._temporary is not None:
            for file in self._local.iterdir():
                (self._directory / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        self._writer.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order written, null as NaN; none if there is no file.

    Lines that are not whole rows of numbers are left out: the last one of a process killed while
    writing, or one that was damaged. So are all if the file cannot be read, with a warning.
    """
    rows, path = [], epath.Path(workdir) / FILE_NAME
    try:
        text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
    except Exception as error:  # each client of buckets has errors of its own
        log.warning("%s cannot be read (%s)", path, getattr(error, "strerror", None) or error)
        text = ""
    for line in text.splitlines(keepends=True):
        row = _parse(line)
        if row is not None:
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


class Accumulator:
    """Means over several steps of metrics that come as sums and counts.

    The mean is the sum of all sums over the sum of all counts, never a mean of means: steps and
    devices with more masked tokens weigh more, as they should.
    """

    def __init__(self, totals: Totals | None = None) -> None:
        self._totals = {name: (float(a), float(b)) for name, (a, b) in (totals or {}).items()}

    @property
    def totals(self) -> Totals:
        """Everything added since the last ``reset``: what another accumulator continues from."""
        return dict(self._totals)

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds one step's ``{name: (sum, count)}``, host or device scalars.

        Device arrays are fetched, which waits for the step that computes them: hand over the
        metrics of the step before the one just dispatched.
        """
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + float(total), old_count + float(count))

    def means(self) -> dict[str, float]:
        """Mean per name since the last ``reset``; a name that counted nothing is left out."""
        return {name: total / count for name, (total, count) in self._totals.items() if count}

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._totals.clear()


def _json_number(value: Any) -> int | float | None:
    """Integers whole, others in the digits that tell float32s apart: 6.1, not 6.0999999."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(str(np.float32(value))) if math.isfinite(value) else None


def _parse(line: str) -> dict[str, Any] | None:
    """The row on a line, or None for a line that is not one whole row of numbers."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(map(_is_number, row.values())):
        return None
    return row if isinstance(row.get("step"), int) and row["step"] >= 0 else None


def _is_number(value: Any) -> bool:
    """As a row holds them; an integer beyond all floats is a damaged one."""
    if isinstance(value, bool):
        return False
    return (
        value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    )


def _kept_lines(path: epath.Path, start_step: int) -> list[str]:
    """The whole lines of a run that goes on after ``start_step``; none for one that starts."""
    if not start_step:
        return []
    lines = (read_side_file(path) or "").splitlines(keepends=True)
    rows = [(line, _parse(line)) for line in lines]
    # The last one may have been cut off by a kill, which is no damage.
    damaged = sum(row is None and line.endswith("\n") for line, row in rows)
    if damaged:
        log.warning("%s: %d line(s) cannot be read and are left out", path, damaged)
    return [line for line, row in rows if row is not None and row["step"] <= start_step]


def _replace(path: epath.Path, text: str) -> None:
    """Writes a whole file in one go: renamed into place locally, one object in a bucket."""
    if is_bucket(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cannot_write(path: epath.Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(
        f"metrics cannot be written to {path} ({reason}); make room there or choose another "
        "workdir that can be written."
    )
