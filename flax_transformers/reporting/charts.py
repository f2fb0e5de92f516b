"""Line charts as SVG: part of a page, in its colors, without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flax_transformers.monitoring.metrics import visible_limits

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
_POINTS = 300
"""Points of a line: of more, the lowest and highest of equal stretches are kept."""


@dataclass(frozen=True)
class Line:
    """Values over steps; not finite ones are gaps. ``color``: number of the run's color."""

    name: str
    color: int
    steps: Sequence[int]
    values: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Reference:
    """A horizontal line."""

    name: str
    value: float


def line_chart(
    title: str, lines: Sequence[Line], references: Sequence[Reference] = (), *, zero: bool = False
) -> str:
    """An SVG element; empty if no value is finite. ``zero``: the vertical axis begins at 0."""
    finite = [sorted(filter(math.isfinite, line.values)) for line in lines]
    if not any(finite):
        return ""
    low, high, margin = visible_limits(finite, [one.value for one in references])
    low, high = 0.0 if zero and low >= 0 else low - margin, high + margin
    last = max(max(line.steps) for line in lines) or 1
    inner = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + inner[0] * step / last

    def y(value: float) -> float:
        return _TOP + inner[1] * (high - value) / (high - low)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        label, height = short_number(tick), y(tick) + 4
        parts.append(f'<text x="{_LEFT - 6}" y="{height:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks(0, last, count=4):
        label, height = short_number(tick), _HEIGHT - 16
        parts.append(f'<text x="{x(tick):.1f}" y="{height}" text-anchor="middle">{label}</text>')
    middle = _LEFT + inner[0] / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 2}" text-anchor="middle">step</text>')
    for one in references:
        parts.append(f'<path class="reference" d="M{_LEFT} {y(one.value):.1f}h{inner[0]}"/>')
        label = escape(f"{one.name} {short_number(one.value)}")
        height = y(one.value) - 4
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{height:.1f}" text-anchor="end">{label}</text>'
        )
    clip = f'<svg x="0" y="{_TOP}" width="{_WIDTH}" height="{inner[1]}" viewBox="0 {_TOP} {_WIDTH} '
    parts.append(f'{clip}{inner[1]}">')
    for line in lines:
        points = [
            (x(step), y(value) if math.isfinite(value) else math.nan)
            for step, value in thinned(line)
        ]
        parts.append(_path(line, points))
    parts.append("</svg>")
    label = escape(title)
    return (
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def _path(line: Line, points: Sequence[tuple[float, float]]) -> str:
    """The path of a line, and its points if they are few; with the last value as a tooltip."""
    commands, drawn = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if drawn else 'M'}{x:.1f} {y:.1f}")
        drawn = math.isfinite(y)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points if math.isfinite(y)
    )
    shown = dots if line.dots or len(points) == 1 else ""
    finite = [value for value in line.values if math.isfinite(value)]
    last = f"{line.name}, last {short_number(finite[-1])}" if finite else line.name
    return (
        f'<g class="line c{line.color}"><title>{escape(last)}</title>'
        f'<path d="{"".join(commands)}"/>{shown}</g>'
    )


def thinned(line: Line) -> list[tuple[int, float]]:
    """Steps and values of a line; of many, the lowest and the highest of each stretch."""
    points = list(zip(line.steps, line.values, strict=True))
    if len(points) <= _POINTS:
        return points
    size = math.ceil(2 * len(points) / _POINTS)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        finite = [point for point in some if math.isfinite(point[1])]
        extremes = {min(finite, key=_value), max(finite, key=_value)} if finite else {some[0]}
        kept += sorted(extremes)
    return kept


def _value(point: tuple[int, float]) -> float:
    return point[1]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers between ``low`` and ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * place for place in range(first, last + 1)]


def short_number(value: float) -> str:
    """Four digits: 8e-04, 0.0125, 1.25, 1,200, 85k, 1.2M, 1.2B, 1.2e+12."""
    size = abs(value)
    if size >= 999.5e9:
        return f"{value:.2g}"
    if size >= 999.5e6:
        return f"{value / 1e9:.3g}B"
    if size >= 999.5e3:  # which three digits round to 1e+03 thousands
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"
