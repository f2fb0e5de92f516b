"""Goodput: the fraction of a run's wall time spent on training steps, over all its attempts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

KINDS = ("steps", "start", "compile", "data_wait", "rollouts", "evaluation", "checkpoint")
"""Kinds of time. ``start``: set-up, the time between two attempts, and the steps after the last
checkpoint that a second attempt repeats. ``rollouts``: sampling and scoring completions."""


class Clock:
    """Divides the wall time of a run, from its start, among ``KINDS``."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now, self._seconds, self._since = now, dict.fromkeys(KINDS, 0.0), now()

    def resume(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """For a run that resumes after ``step``: adds the time of the attempts before.

        ``rows``: all rows of ``read_metrics``, those of later steps too. The time since the last
        row up to ``step`` counts as ``start``.
        """
        whole = [row for row in rows if _is_whole(row)]
        kept = [row for row in whole if row["step"] <= step]
        if kept:
            self._seconds = {kind: kept[-1].get(_name(kind), 0.0) for kind in KINDS}
            self._since = kept[-1]["time"]
        elif whole:  # nothing was saved: the run began before its first row
            self._since = whole[0]["time"] - sum(whole[0].get(_name(kind), 0.0) for kind in KINDS)

    def lap(self, kind: str) -> None:
        """Counts the time since the lap before as ``kind``."""
        now = self._now()
        self._seconds[kind] += max(0.0, now - self._since)  # a clock may be set back
        self._since = now

    def row(self) -> dict[str, float]:
        """``perf/goodput``, the fraction of ``steps``, and the seconds of each kind so far."""
        total = sum(self._seconds.values())
        seconds = {_name(kind): spent for kind, spent in self._seconds.items()}
        return {"perf/goodput": self._seconds["steps"] / total if total else 0.0} | seconds


def _name(kind: str) -> str:
    return f"goodput/{kind}_s"


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row has the time and the seconds of every kind. Version 0.2.0 had no rollouts."""
    values = {_name("rollouts"): 0.0} | dict(row)
    names = ("step", "time", *map(_name, KINDS))
    return all(math.isfinite(values.get(name, math.nan)) for name in names)
