"""Plots of loss, learning rate, gradient norm and throughput over the steps, as PNG files."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from flax_transformers.monitoring.metrics import visible_limits

SIZE_INCHES, DOTS_PER_INCH = (7.2, 4.2), 150
BLUE, ORANGE, GRAY = "#1f6fb4", "#e0701a", "#6b7280"
Series = tuple[list[int], list[float]]


def plot_metrics(
    rows: Sequence[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    baselines: Mapping[str, float] | None = None,
) -> list[epath.Path]:
    """Writes loss.png, learning_rate.png, grad_norm.png and throughput.png to ``directory``.

    ``rows`` are those of ``metrics.read_metrics``; a plot without numbers is left out.
    ``baselines`` are losses drawn as dashed lines, such as {"unigram cross-entropy": 6.25}. Values
    that are not finite are gaps. Creates the directory, and returns the paths written.
    """
    folder = epath.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss.png": _loss(rows, baselines or {}),
        "learning_rate.png": _single(rows, "optimizer/learning_rate", "learning rate"),
        "grad_norm.png": _single(rows, "optimizer/grad_norm", "gradient norm"),
        "throughput.png": (
            _single(rows, "perf/tokens_per_second", "tokens per second")
            or _single(rows, "perf/examples_per_second", "examples per second")
        ),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            (folder / name).write_bytes(png_of(figure))
            written.append(folder / name)
    return written


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Steps and values of one metric, in the order of the rows; NaN where not finite."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    values = [value if math.isfinite(value) else math.nan for _, value in found]
    return [step for step, _ in found], values


def _has_numbers(series: Series) -> bool:
    return any(math.isfinite(value) for value in series[1])


def _loss(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> Figure | None:
    train, held_out = _series(rows, "train/loss"), _series(rows, "eval/loss")
    if not (_has_numbers(train) or _has_numbers(held_out)):
        return None
    figure, axes = _figure("loss")
    if _has_numbers(train):
        _line(axes, train, BLUE, "training")
    if _has_numbers(held_out):
        _line(axes, held_out, ORANGE, f"held-out, last {_last(held_out):.2f}", marker="o")
    for name, value in baselines.items():
        axes.axhline(value, color=GRAY, linestyle=(0, (5, 4)), linewidth=1.2)
        axes.annotate(
            f"{name} {value:.2f}",
            xy=(1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=GRAY,
        )
    axes.legend(frameon=False, loc="upper right")
    losses = [sorted(filter(math.isfinite, values)) for _, values in (train, held_out)]
    low, high, margin = visible_limits(losses, list(baselines.values()))
    axes.set_ylim(low - margin, high + margin)
    return figure


def _single(rows: Sequence[Mapping[str, Any]], name: str, label: str) -> Figure | None:
    series = _series(rows, name)
    if not _has_numbers(series):
        return None
    figure, axes = _figure(label)
    _line(axes, series, BLUE)
    axes.set_ylim(bottom=0)
    return figure


def _tick(value: float, _: int) -> str:
    """Learning rates as 8e-4, steps as 1,200, throughput as 85k."""
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) < 10_000:
        return f"{value:,g}"
    return EngFormatter(sep="")(value)


def _last(series: Series) -> float:
    return next(value for value in reversed(series[1]) if math.isfinite(value))


def _line(
    axes: Axes, series: Series, color: str, label: str | None = None, marker: str | None = None
) -> None:
    # A single point makes no line.
    marker = marker or ("o" if len(series[0]) == 1 else None)
    axes.plot(*series, color=color, label=label, linewidth=1.4, marker=marker, markersize=4)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.02 * max(series[0]), 1))


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def png_of(figure: Figure) -> bytes:
    """The bytes of the figure's PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
