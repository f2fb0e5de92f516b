"""Metrics on the host: rows of metrics.jsonl, and means over steps.

metrics.jsonl holds one row per line, ``{"step": 120, "time": 1767225600.0, "train/loss": 6.1}``,
``time`` in seconds since 1970. A number that is not finite is written as null (JSON has no NaN).
Read it with ``read_metrics`` or ``pandas.read_json(path, lines=True)``. It is written by
``sinks.JsonLines``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from flax_transformers.storage.workdir import read_side_file

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"

Totals = Mapping[str, tuple[float, float]]
"""Metric name to (sum, count), on the host."""


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


def kept_lines(path: epath.Path, start_step: int) -> list[str]:
    """The whole lines of a run that resumes after ``start_step``; none for a run that starts."""
    if not start_step:
        return []
    lines = (read_side_file(path) or "").splitlines(keepends=True)
    rows = [(line, _parse(line)) for line in lines]
    # The last one may have been cut off by a kill, which is no damage.
    damaged = sum(row is None and line.endswith("\n") for line, row in rows)
    if damaged:
        log.warning("%s: %d line(s) cannot be read and are left out", path, damaged)
    return [line for line, row in rows if row is not None and row["step"] <= start_step]
