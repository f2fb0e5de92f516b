"""Progress of a run on the console: a bar in a terminal, otherwise lines."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flax_transformers.monitoring.sinks import MetricSink

LINE_SECONDS = 10.0
# A line without new metrics, which only says that the run goes on, waits so many times longer.
QUIET_FACTOR = 3
REFRESHES_PER_SECOND = 4
# Fields are dropped before the bar becomes shorter than this.
SHORTEST_BAR = 8


class Progress(MetricSink):
    """The sink that prints: step, loss, accuracy, tokens per second and the time left.

    On a terminal it is one line that redraws itself, with messages scrolling above it. Elsewhere
    (a file, a pipe, a batch system's log) it is one plain line for new metrics, at most every
    ``line_seconds``, and one at the end. If no metrics come for three times as long, a line has the
    step and the time left alone: no number is printed twice.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        line_seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step = total_steps, start_step
        self._console = console or Console()
        self._line_seconds = line_seconds
        self._clock = clock
        self._started = clock()
        self._last_line: float | None = None
        self._metrics: dict[str, float] = {}
        self._pace = Pace()
        # Drawn by rich's thread while the loop's thread updates: kept as one finished string.
        self._time = ""
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=REFRESHES_PER_SECOND)

    def step(self, step: int) -> None:
        """Report that ``step`` steps are done."""
        self.write(step, {})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that ``step`` steps are done; ``metrics`` replace those of the same name.

        ``train/loss`` (where there are rollouts, ``rollout/reward`` instead), ``train/accuracy``
        and ``perf/tokens_per_second``, or without tokens ``perf/examples_per_second``, are
        displayed; others are ignored. Host numbers only.
        """
        self._step = step
        self._metrics.update(metrics)
        now = self._clock()
        self._pace.add(step, now)
        if step >= self._total:
            self._time = f"done in {format_duration(now - self._started)}"
        elif (pace := self._pace.seconds_per_step()) is not None:
            self._time = f"{format_duration(pace * (self._total - step)):>7} left"
        if self._live is not None:
            return
        wait = self._line_seconds * (1 if self._shown_metrics() else QUIET_FACTOR)
        due = self._last_line is None or now - self._last_line >= wait
        if due and step < self._total:
            self._last_line = now
            self._print_line()

    def _print_line(self) -> None:
        # A reader that went away (head, a closed terminal) must not end a training run: rich turns
        # itself off and raises SystemExit. Nor must a full disk that the output goes to.
        with contextlib.suppress(SystemExit, OSError):
            text = "  ".join([f"step {self._position()}", *self._fields()])
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._metrics.clear()

    def _position(self) -> str:
        total = f"{self._total:,}"
        return f"{self._step:{len(total)},}/{total}"

    def _fields(self) -> list[str]:
        """The fields after the position; padded, so that the bar keeps its length."""
        if not self._pace.started and not self._time:
            return [f"compiling the first step {format_duration(self._clock() - self._started):>4}"]
        fields = self._shown_metrics()
        return [*fields, self._time] if self._time else fields

    def _shown_metrics(self) -> list[str]:
        """Those of the metrics that are displayed, as text."""
        fields = []
        if (reward := self._metrics.get("rollout/reward")) is not None:
            fields.append(f"reward {reward:.3f}")  # the loss is near zero whatever is learned
        elif (loss := self._metrics.get("train/loss")) is not None:
            fields.append(f"loss {loss:.3f}")
        if (accuracy := self._metrics.get("train/accuracy")) is not None:
            fields.append(f"acc {100 * accuracy:4.1f}%")
        if (speed := self._metrics.get("perf/tokens_per_second")) is not None:
            fields.append(f"{format_number(speed):>5} tok/s")
        elif (speed := self._metrics.get("perf/examples_per_second")) is not None:
            fields.append(f"{format_number(speed):>5} examples/s")
        return fields

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        position, fields = self._position(), self._fields()
        # Too narrow: the fields in the middle go first, then the loss; the time left stays.
        while len(fields) > 1 and self._width(position, fields) > options.max_width:
            fields.pop(-2 if self._time else -1)
        bar = ProgressBar(
            total=max(1, self._total),
            completed=self._step,
            complete_style="cyan",
            finished_style="green",
        )
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        cells: list[Text | ProgressBar] = [Text(position, style="bold"), bar]
        for field in fields:
            line.add_column(no_wrap=True, justify="right")
            cells.append(Text(field))
        line.add_row(*cells)
        yield line

    @staticmethod
    def _width(position: str, fields: list[str]) -> int:
        return len(position) + 2 + SHORTEST_BAR + sum(2 + len(field) for field in fields)

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._step < self._total:
            self._time = f"stopped after {format_duration(self._clock() - self._started)}"
        if self._live is not None:
            self._live.stop()
        elif self._pace.started:
            self._print_line()


class Pace:
    """Seconds per step, averaged over the last updates.

    The first update only starts the clock, since compilation comes before it. A later update that
    took far longer than is typical (another compilation, a pause) counts as ``LONGEST`` typical
    ones, so that it does not upset the estimate, while shorter regular work between steps, such as
    evaluation, counts in full.
    """

    WINDOW = 200
    LONGEST = 20

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._intervals: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)

    @property
    def started(self) -> bool:
        """True once a step is done."""
        return self._last is not None

    def add(self, step: int, now: float) -> None:
        """Notes that ``step`` steps were done at the time ``now``, in seconds.

        Only the first update of a step counts: the time up to later ones is part of the next step.
        """
        if self._last is not None and step == self._last[0]:
            return
        if self._last is not None and step > self._last[0]:
            self._intervals.append((step - self._last[0], now - self._last[1]))
        self._last = (step, now)

    def seconds_per_step(self) -> float | None:
        """The average, or None before two updates have been seen."""
        if not self._intervals:
            return None
        longest = self.LONGEST * median(seconds / steps for steps, seconds in self._intervals)
        total = sum(min(seconds, longest * steps) for steps, seconds in self._intervals)
        return total / sum(steps for steps, _ in self._intervals)


def format_number(value: float) -> str:
    """Three digits and a magnitude: 85.3k, 110M, 8.03B, 1.2T; whole numbers below 1000."""
    if not math.isfinite(value):
        return str(value)
    magnitudes = ("", "k", "M", "B", "T")
    scaled, magnitude = float(value), 0
    while abs(scaled) >= 999.5 and magnitude < len(magnitudes) - 1:
        scaled, magnitude = scaled / 1000, magnitude + 1
    if magnitude == 0 and scaled == int(scaled):
        return str(int(scaled))
    decimals = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{decimals}f}{magnitudes[magnitude]}"


def format_duration(seconds: float) -> str:
    """The two largest units: 42s, 3m 20s, 5h 02m, 3d 04h; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {whole % 60:02d}s"
    return f"{whole}s"
