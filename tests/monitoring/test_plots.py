"""Which pictures are drawn from which rows, and what stands in them."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from flax_transformers.monitoring import plots
from flax_transformers.monitoring.plots import plot_metrics

ROWS = [
    {"step": 0, "eval/loss": 8.3},
    {"step": 10, "train/loss": 8.0, "optimizer/learning_rate": 1e-4, "optimizer/grad_norm": 2.0},
    {"step": 20, "train/loss": 7.0, "perf/tokens_per_second": 2e4},
    {"step": 20, "eval/loss": 7.1},
]


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


@pytest.mark.slow
def test_one_png_is_written_for_each_metric_that_the_rows_hold(tmp_path):
    paths = plot_metrics(ROWS, tmp_path / "plots")
    names = ["grad_norm.png", "learning_rate.png", "loss.png", "throughput.png"]
    assert sorted(path.name for path in paths) == names
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == (1080, 630)


@pytest.mark.parametrize("rows", [[], [{"step": 1, "train/loss": math.nan, "other": 1.0}]])
def test_nothing_is_drawn_where_there_are_no_numbers(tmp_path, rows):
    assert plot_metrics(rows, tmp_path, {"unigram": 6.0}) == []


def test_the_loss_plot_shows_both_losses_at_their_steps():
    drawn = lines(plots._loss(ROWS, {}))
    np.testing.assert_array_equal(drawn["training"].get_xydata(), [[10, 8], [20, 7]])
    held_out = drawn["held-out, last 7.10"]
    np.testing.assert_array_equal(held_out.get_xydata(), [[0, 8.3], [20, 7.1]])


def test_a_baseline_is_a_dashed_line_with_its_name_and_value_in_sight():
    figure = plots._loss(ROWS, {"unigram cross-entropy": 6.254})
    (axes,) = figure.axes
    dashed = [line for line in axes.lines if line.is_dashed()]
    assert [list(line.get_ydata()) for line in dashed] == [[6.254, 6.254]]
    assert [text.get_text() for text in axes.texts] == ["unigram cross-entropy 6.25"]
    assert axes.get_ylim()[0] < 6.254


def test_the_first_steps_do_not_flatten_the_rest_of_the_curve():
    rows = [{"step": step, "train/loss": 100.0 if step < 2 else 5.0} for step in range(200)]
    low, high = plots._loss(rows, {}).axes[0].get_ylim()
    assert low < 5 < high < 10


def test_the_held_out_loss_of_a_run_that_overfits_is_visible():
    rows = [{"step": step, "train/loss": 0.1} for step in range(1000)]
    rows += [{"step": step, "eval/loss": 1 + step / 1000} for step in range(0, 1000, 100)]
    low, high = plots._loss(rows, {}).axes[0].get_ylim()
    assert low < 0.1 and high > 1.9


def test_a_value_that_is_not_finite_leaves_a_gap():
    rows = [{"step": s, "train/loss": v} for s, v in enumerate([3.0, math.inf, math.nan, 2.0])]
    drawn = lines(plots._loss(rows, {}))["training"].get_ydata()
    np.testing.assert_array_equal(drawn, [3.0, math.nan, math.nan, 2.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (8e-4, "8e-4"), (1e-3, "1e-3"), (0.5, "0.5"), (1200, "1,200"), (85000, "85k")],
)
def test_ticks_are_short(value, text):
    assert plots._tick(value, 0) == text
