"""Metrics on the host: rows of metrics.jsonl, and means over steps.

metrics.jsonl holds one row per line, ``{"step": 120, "time": 1767225600.0, "train/loss": 6.1}``,
``time`` in seconds since 1970. A number that is not finite is written as null (JSON has no NaN).
Read it with ``read_metrics`` or ``pandas.read_json(path, lines=True)``. It is written by
``file_sinks.JsonLines``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    Incomplete or damaged lines are left out, such as the last line of a process that was killed.
    A file that cannot be read has no rows, and a warning is logged.
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


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for a number that is not finite."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Accumulator:
    """Means over several steps of metrics given as sums and counts.

    A mean is the sum of all sums over the sum of all counts, so that steps and devices with more
    masked tokens have more weight.
    """

    def __init__(self, totals: Totals | None = None) -> None:
        self._totals = {name: (float(a), float(b)) for name, (a, b) in (totals or {}).items()}

    @property
    def totals(self) -> Totals:
        """The sums since the last ``reset``, from which another accumulator can continue."""
        return dict(self._totals)

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds one step's ``{name: (sum, count)}``, host or device scalars.

        Device arrays are fetched, which waits for the step that computes them: add the metrics of
        the step before the one just dispatched.
        """
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + float(total), old_count + float(count))

    def means(self) -> dict[str, float]:
        """Means since the last ``reset``, without metrics whose count is zero."""
        return {name: total / count for name, (total, count) in self._totals.items() if count}

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._totals.clear()


def fetched_one_behind(results: Iterable[Any]) -> Iterator[Any]:
    """The results of a step on the host, each fetched after the next step was dispatched, so that
    the device computes while the next batch is prepared."""
    pending = None
    for result in results:
        if pending is not None:
            yield jax.device_get(pending)
        pending = result
    if pending is not None:
        yield jax.device_get(pending)


def _parse(line: str) -> dict[str, Any] | None:
    """The row on a line; None for a damaged line."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(map(_is_number, row.values())):
        return None
    return row if isinstance(row.get("step"), int) and row["step"] >= 0 else None


def _is_number(value: Any) -> bool:
    """Whether a value of a row is a number or null; integers of over 64 bits are damage."""
    if isinstance(value, bool):
        return False
    return (
        value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    )


VISIBLE_FRACTION = 0.98
"""Fraction of a line's values within the limits of a plot: its first steps would flatten the
rest."""


def visible_limits(
    lines: Sequence[Sequence[float]], others: Sequence[float]
) -> tuple[float, float, float]:
    """The lowest and the highest value to show, around ``VISIBLE_FRACTION`` of the sorted, finite
    values of each line and all of ``others``, and a margin.

    Of each line, not of all values: a run that logs less often than others is visible as a whole.
    """
    tops = [line[int(VISIBLE_FRACTION * len(line))] for line in lines if line]
    low, high = min([line[0] for line in lines if line] + [*others]), max([*tops, *others])
    return low, high, 0.08 * (high - low) or 0.05 * abs(high) or 0.5


def metrics_up_to(path: epath.Path, start_step: int) -> list[str]:
    """The lines of a metrics.jsonl that a run which resumes after ``start_step`` keeps."""

    def step_of(line: str) -> int | None:
        row = _parse(line)
        return None if row is None else row["step"]

    return lines_up_to(path, start_step, step_of) if start_step else []


def lines_up_to(path: epath.Path, step: int, step_of: Callable[[str], int | None]) -> list[str]:
    """The lines of a file for steps up to ``step``; ``step_of`` gives None for a damaged line.

    Damaged lines are counted in a warning, except for the last one if a kill cut it off.
    """
    lines = (read_side_file(path) or "").splitlines(keepends=True)
    steps = [(line, step_of(line)) for line in lines]
    damaged = sum(found is None and line.endswith("\n") for line, found in steps)
    if damaged:
        log.warning("%s: %d line(s) cannot be read and are left out", path, damaged)
    return [line for line, found in steps if found is not None and found <= step]
