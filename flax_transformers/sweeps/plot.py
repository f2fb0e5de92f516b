"""The plot of a sweep: every run as a point, best grid point at the top."""

from __future__ import annotations

from etils import epath
from matplotlib.figure import Figure

from flax_transformers.monitoring.plots import BLUE, DOTS_PER_INCH, GRAY, ORANGE, png_of
from flax_transformers.storage.workdir import write_bytes
from flax_transformers.sweeps.table import Table

_AXES_WIDTH, _LETTER_WIDTH, _ROW_HEIGHT, _MARGIN = 5.6, 0.085, 0.32, 1.2
"""Inches."""
_MAX_ROWS = 60


def plot_table(table: Table) -> epath.Path:
    """Writes plot.png to the sweep's folder: values of each seed, medians, and the score without a
    model as a dashed line if it is near. Shows the best 60 points."""
    rows = table.rows[:_MAX_ROWS]
    baseline = table.sweep.baseline.name
    labels = [
        f"{row.point.name or 'config'}{' (baseline)' if row.point.name == baseline else ''}"
        for row in rows
    ]
    width = _AXES_WIDTH + _LETTER_WIDTH * max(map(len, labels))
    figure = Figure((width, _MARGIN + _ROW_HEIGHT * len(rows)), DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    for height, row in enumerate(rows):
        values = list(row.values.values())
        axes.plot(values, [height] * len(values), "o", color=BLUE, alpha=0.6, markersize=5)
        axes.plot([row.scores.median] * 2, [height - 0.3, height + 0.3], color=ORANGE, linewidth=2)
    low = min(row.scores.low for row in rows)
    high = max(row.scores.high for row in rows)
    margin = 0.08 * (high - low) or 0.01 * abs(high) or 0.01
    axes.set_xlim(low - margin, high + margin)
    shown = [f"{name} {score:.4g}" for name, score in table.trivial.items()]
    for score in table.trivial.values():
        axes.axvline(score, color=GRAY, linestyle=(0, (5, 4)), linewidth=1.2)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the best at the top
    better = "higher" if table.sweep.study.higher_is_better else "lower"
    axes.set_xlabel(f"{table.sweep.study.metric} ({better} is better; bar: median of the seeds)")
    if shown:
        axes.set_title(f"without a model: {', '.join(shown)}", fontsize=9, color=GRAY, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    path = table.sweep.folder / "plot.png"
    write_bytes(path, png_of(figure))
    return path
