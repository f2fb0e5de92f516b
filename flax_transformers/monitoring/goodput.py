"""Where the wall time of a run goes, over all its attempts: goodput, and what takes the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

KINDS = ("steps", "start", "compile", "data_wait", "evaluation", "checkpoint")
"""What time is spent on. ``start`` is starting and starting again: the set-up, the time between two
attempts, and the steps that were lost with the first and had to be done again."""


class Clock:
    """Divides the wall time of a run among ``KINDS``: every second since it began counts once."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now, self._seconds, self._since = now, dict.fromkeys(KINDS, 0.0), now()

    def go_on(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """For a run that goes on after ``step``: takes over what was spent before.

        ``rows`` are those of ``read_metrics``, also the ones beyond ``step``. All between the last
        one that still counts and now is ``start``.
        """
        told = [row for row in rows if _is_whole(row)]
        kept = [row for row in told if row["step"] <= step]
        if kept:
            self._seconds = {kind: kept[-1][_name(kind)] for kind in KINDS}
            self._since = kept[-1]["time"]
        elif told:  # nothing was saved: the run began before what its first row tells of
            self._since = told[0]["time"] - sum(told[0][_name(kind)] for kind in KINDS)

    def lap(self, kind: str) -> None:
        """All since the lap before was spent on ``kind``."""
        now = self._now()
        self._seconds[kind] += max(0.0, now - self._since)  # clocks are set back at times
        self._since = now

    def row(self) -> dict[str, float]:
        """``perf/goodput``, the share of useful steps, and the seconds of each kind since the run
        began."""
        total = sum(self._seconds.values())
        seconds = {_name(kind): spent for kind, spent in self._seconds.items()}
        return {"perf/goodput": self._seconds["steps"] / total if total else 0.0} | seconds


def _name(kind: str) -> str:
    return f"goodput/{kind}_s"


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row tells the time and what it was spent on, as those of `Clock.row` do."""
    names = ("step", "time", *map(_name, KINDS))
    return all(math.isfinite(row.get(name, math.nan)) for name in names)
