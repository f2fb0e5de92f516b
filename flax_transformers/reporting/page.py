"""The page of a report: one HTML file that needs nothing else, for wide and narrow windows and for
light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from flax_transformers.reporting.attention_charts import attention_chart
from flax_transformers.reporting.charts import Line, Reference, line_chart, short_number
from flax_transformers.reporting.runs import Picture, ReportedRun, SweepTable

_STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
COLORS = 8
_STYLE += "".join(f".c{number} {{ color: var(--c{number}); }}\n" for number in range(COLORS))

_FIRST = ("train/loss", "eval/loss")
_GROUPS = (
    ("Held-out scores", "eval/"),
    ("Training", "train/"),
    ("Rollouts", "rollout/"),
    ("Optimizer", "optimizer/"),
    ("Throughput", "perf/"),
)
_FROM_ZERO = ("perf/", "optimizer/learning_rate")


def page(runs: Sequence[ReportedRun], sweeps: Sequence[SweepTable]) -> str:
    """The page of ``runs`` and ``sweeps``."""
    swept = {str(sweep.folder) for sweep in sweeps}
    alone = [run.name for run in runs if str(run.folder.parent) not in swept]
    names = [sweep.name for sweep in sweeps] + alone
    title = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    sections = [
        _legend(runs),
        _summary(runs),
        *_curves(runs),
        _differences(runs),
        _texts("Samples", [(one.name, [one.samples] if one.samples else []) for one in runs]),
        _pictures(runs),
        _texts("Classes", [(one.name, one.reports) for one in runs], "table"),
        _attention(runs),
        *map(_sweep, sweeps),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )


def _color(place: int) -> int:
    return place % COLORS


def _legend(runs: Sequence[ReportedRun]) -> str:
    items = (
        f'<li><span class="swatch c{_color(place)}"></span>{escape(run.name)}</li>'
        for place, run in enumerate(runs)
    )
    return f'<ul class="legend">{"".join(items)}</ul>' if runs else ""


def series(run: ReportedRun, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric of a run."""
    found = [(row["step"], float(row[metric])) for row in run.rows if metric in row]
    return [step for step, _ in found], [value for _, value in found]


def _metrics(runs: Sequence[ReportedRun], prefix: str) -> list[str]:
    """Names of the numeric metrics with a prefix, losses first."""
    names = {
        name
        for run in runs
        for row in run.rows
        for name, value in row.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    }
    return sorted(names, key=lambda name: (name not in _FIRST, name))


def _curves(runs: Sequence[ReportedRun]) -> list[str]:
    sections = []
    for title, prefix in _GROUPS:
        charts = [_chart(runs, metric) for metric in _metrics(runs, prefix)]
        cards = [f'<div class="card">{chart}</div>' for chart in charts if chart]
        if cards:
            sections.append(_section(title, f'<div class="cards">{"".join(cards)}</div>'))
    return sections


def _chart(runs: Sequence[ReportedRun], metric: str) -> str:
    lines = []
    for place, run in enumerate(runs):
        steps, values = series(run, metric)
        if steps:
            dots = metric.startswith("eval/")
            lines.append(Line(run.name, _color(place), steps, values, dots))
    if not any(value for line in lines for value in line.values):  # such as skipped steps
        return ""
    svg = line_chart(metric, lines, _references(runs, metric), zero=metric.startswith(_FROM_ZERO))
    return f"<h3>{escape(metric)}</h3>{svg}" if svg else ""


def _references(runs: Sequence[ReportedRun], metric: str) -> list[Reference]:
    """The baselines of a metric, each value once."""
    found = {
        (str(one["name"]), float(one["score"])): None
        for run in runs
        for one in run.baselines
        if one.get("metric") == metric and math.isfinite(one.get("score", math.nan))
    }
    return [Reference(*one) for one in found]


def _summary(runs: Sequence[ReportedRun]) -> str:
    """The last scores of each run."""
    if not runs:
        return ""
    metrics = _metrics(runs, "eval/") or _metrics(runs, "train/")
    head = ["run", "last step", *metrics]
    rows = []
    for run in runs:
        last = {metric: values[-1] for metric in metrics if (values := series(run, metric)[1])}
        step = max((row["step"] for row in run.rows), default=0)
        scores = [short_number(last[metric]) if metric in last else "" for metric in metrics]
        rows.append([run.name, f"{step:,}", *scores])
    return _section("Runs", _table(head, rows))


def _differences(runs: Sequence[ReportedRun]) -> str:
    """Fields of the configs that are not equal, or the one config."""
    fields = list(dict.fromkeys(name for run in runs for name in run.config))
    if len(runs) == 1:
        rows = [[name, runs[0].config[name]] for name in fields]
        table = _table(["field", "value"], rows)
        return _section("Config", f"<details><summary>All fields</summary>{table}</details>")
    rows = [
        [name, *values]
        for name in fields
        if len(set(values := [run.config.get(name, "") for run in runs])) > 1
    ]
    if not rows:
        return _section("Config", "<p>The configs are equal.</p>") if runs else ""
    head = ["field", *(run.name for run in runs)]
    return _section("Differences of the configs", _table(head, rows))


def _texts(title: str, of_runs: Sequence[tuple[str, Sequence[Any]]], kind: str = "") -> str:
    cards = [
        f'<div class="card"><h3>{escape(name)}, {escape(one.title)}</h3>'
        f'<pre class="{kind}" tabindex="0">{escape(one.content)}</pre></div>'
        for name, texts in of_runs
        for one in texts
    ]
    return _section(title, f'<div class="cards">{"".join(cards)}</div>') if cards else ""


def _pictures(runs: Sequence[ReportedRun]) -> str:
    cards = [
        f'<div class="card">{_image(run.name, one)}</div>' for run in runs for one in run.pictures
    ]
    return _section("Pictures", f'<div class="cards">{"".join(cards)}</div>') if cards else ""


def _image(name: str, picture: Picture) -> str:
    title = escape(f"{name}, {picture.title}")
    return f'<h3>{title}</h3><img src="{picture.uri}" alt="{title}">'


_MAPS = (
    "What heads attend to in held-out examples: layers in rows, heads in columns. In the map of a "
    "head, a row is a position that attends, a column one that is attended to; over an image it is "
    "what the class token attends to, or all patches on average. The color is full at the largest "
    "value of each map."
)


def _attention(runs: Sequence[ReportedRun]) -> str:
    parts = []
    for first, run in enumerate(runs):
        if run.attention_note:
            parts.append(f"<p>{escape(f'{run.name}: {run.attention_note}')}</p>")
        cards = []
        for place, maps in enumerate(run.attention):
            kind = "card" if maps.picture is None else "card image"
            title = escape(f"{run.name}, {maps.title}")
            chart = attention_chart(maps, f"attention-{first}-{place}")
            cards.append(f'<div class="{kind}"><h3>{title}</h3>{chart}</div>')
        if cards:
            parts.append(f'<div class="attention">{"".join(cards)}</div>')
    return _section("Attention", f"<p>{_MAPS}</p>{''.join(parts)}") if parts else ""


def _sweep(sweep: SweepTable) -> str:
    columns = list(dict.fromkeys(name for one in sweep.records for name in one))
    columns = ["point", *(name for name in columns if name not in ("point", "values"))]
    rows = [[_cell(one.get(name)) for name in columns] for one in sweep.records]
    picture = f'<div class="card">{_image(sweep.name, sweep.plot)}</div>' if sweep.plot else ""
    count = f"<p>{sweep.finished} of {sweep.runs} runs are finished.</p>"
    table = _table(columns, rows) if rows else ""
    return _section(f"Sweep {sweep.name}", count + table + picture)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return short_number(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><tr>{cells}</tr>{"".join(lines)}</table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"
