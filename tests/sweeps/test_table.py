"""The table of a sweep: its order, its comparisons, its files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from etils import epath

from flax_transformers.cli.parsing import override
from flax_transformers.errors import UserError
from flax_transformers.sweeps.plot import plot_table
from flax_transformers.sweeps.runner import Result
from flax_transformers.sweeps.study import Study, StudyRuns, points
from flax_transformers.sweeps.table import cells, make_table, markdown, notes, write_table
from flax_transformers.testing import tiny_config

STUDY = Study(
    base=tiny_config("text.txt", "store"),
    variants={"plain": {}, "wide": {"model.hidden_size": 64}, "deep": {"model.num_layers": 3}},
    seeds=3,
    published="width helps more than depth",
    citation="Nobody, 2017",
    expected=(("wide", "deep"), ("deep", "plain")),
)
LOSSES = {"plain": (3.0, 3.2, 3.1), "wide": (2.5, 2.6, 2.4), "deep": (3.3, 2.9, 3.35)}


def made(folder, losses=LOSSES, study=STUDY, failures=()):
    """The table of given losses; ``failures`` are names of runs."""
    found = points(study, {}, override)
    sweep = StudyRuns(study, tuple(found), found[0], epath.Path(folder))
    results = [
        Result(run, failure="it was too bad")
        if run.name in failures
        else Result(run, {"step": 4, study.metric: losses[run.point.name][run.seed]})
        for run in sweep.runs
    ]
    return make_table(sweep, results)


def test_points_are_ranked_by_the_median_in_the_direction_of_the_metric(tmp_path):
    assert [row.point.name for row in made(tmp_path).rows] == ["wide", "plain", "deep"]
    upwards = replace(STUDY, metric="eval/accuracy")
    assert [row.point.name for row in made(tmp_path, study=upwards).rows] == [
        *("deep", "plain", "wide")
    ]


def test_a_row_has_the_spread_and_both_comparisons(tmp_path):
    assert cells(made(tmp_path)) == [
        ["1", "wide", "3", "2.5", "2.4 to 2.6", "2.5 ± 0.1", "-0.6", "0.5", "", ""],
        ["2", "plain (baseline)", "3", "3.1", "3 to 3.2", "3.1 ± 0.1", "", "", "+0.6", "0.5"],
        ["3", "deep", "3", "3.3", "2.9 to 3.35", "3.1833 ± 0.25", "+0.083", "1", "+0.68", "0.5"],
    ]


def test_the_notes_say_what_cannot_be_significant_and_what_was_expected(tmp_path):
    found = notes(made(tmp_path))
    assert found[0] == "eval/loss: lower is better; ranked by the median."
    assert "exact, and Holm's correction" in found[1]
    assert found[2].startswith("With 3 seed(s) no p can be below 0.25")
    assert found[3] == (
        "wide against deep: better by 0.6833 on average, in 3 of 3 seeds, p 0.5: the published "
        "direction, not significant."
    )
    assert found[4].startswith("deep against plain: better by -0.08333 on average, in 1 of 3 seeds")
    assert found[4].endswith(": the published direction does not appear.")


def test_with_enough_seeds_a_difference_in_one_direction_is_significant(tmp_path):
    study = replace(STUDY, seeds=7, expected=(("wide", "plain"),))
    losses = {"plain": [3.0] * 7, "wide": [2.9 - 0.01 * n for n in range(7)], "deep": [3.1] * 7}
    found = notes(made(tmp_path, losses, study))
    assert not any("seed(s)" in note for note in found)
    assert found[2].endswith("in 7 of 7 seeds, p 0.0156: the published direction.")


def test_failed_runs_are_listed_and_the_others_of_the_point_are_counted(tmp_path):
    table = made(tmp_path, failures=("wide,seed=1",))
    assert table.failures == {"wide,seed=1": "it was too bad"}
    (wide,) = (row for row in table.rows if row.point.name == "wide")
    assert wide.scores.n == 2 and wide.against_baseline.pairs == 2
    assert "Failed runs:\n\n- wide,seed=1: it was too bad" in markdown(table)


def test_a_score_that_is_not_finite_is_a_failure(tmp_path):
    table = made(tmp_path, LOSSES | {"deep": (float("nan"), 2.0, 2.0)})
    assert table.failures == {"deep,seed=0": "eval/loss is not finite"}
    assert table.rows[0].point.name == "deep" and table.rows[0].scores.n == 2


def test_a_run_without_the_metric_is_listed_and_does_not_hide_the_others(tmp_path):
    table = made(tmp_path)
    with_score, without = table.sweep.runs[:2]
    scores = [Result(with_score, {"eval/loss": 1.0}), Result(without, {"eval/accuracy": 0.5})]
    found = make_table(table.sweep, scores)
    assert found.failures == {without.name: "eval/loss is not among its scores"}
    assert sum(row.scores.n for row in found.rows) == 1


def test_without_a_finished_run_or_with_an_unknown_metric_there_is_no_table(tmp_path):
    everything = [f"{name},seed={seed}" for name in LOSSES for seed in range(3)]
    with pytest.raises(UserError, match="no run of this sweep is finished in .*; 9 failed"):
        made(tmp_path, failures=everything)
    table = made(tmp_path)
    run = table.sweep.runs[0]
    asked = replace(table.sweep, study=replace(STUDY, metric="eval/f1"))
    with pytest.raises(
        UserError,
        match="--metric eval/f1 is not among the scores of plain,seed=0: eval/accuracy, eval/loss",
    ):
        make_table(asked, [Result(run, {"eval/loss": 1.0, "eval/accuracy": 0.5, "step": 4})])


def test_the_files_hold_every_value(tmp_path):
    table = made(tmp_path)
    assert [path.name for path in write_table(table)] == ["table.csv", "table.jsonl", "table.md"]
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert rows[0]["point"] == "wide" and float(rows[0]["seed_1"]) == 2.6
    assert float(rows[0]["difference_to_baseline"]) == pytest.approx(-0.6)
    assert rows[0]["p_to_best"] == ""
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert lines[2]["values"] == {"0": 3.3, "1": 2.9, "2": 3.35}
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("| rank | point | n | median |")
    assert "- 9 of 9 runs are finished." in text
    unfinished = markdown(made(tmp_path, failures=["plain,seed=0"]))
    assert "- 8 of 9 runs are finished, 1 failed." in unfinished
    assert "Published: width helps more than depth (Nobody, 2017)" in text


def test_a_plot_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    (tmp_path / "plot.png").write_bytes(b"of another part")
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(UserError, match="plot.png cannot be written"):
        plot_table(made(tmp_path))
    assert (tmp_path / "plot.png").read_bytes() == b"of another part"


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn, instead of their bytes."""
    found = []
    monkeypatch.setattr(
        "flax_transformers.sweeps.plot.png_of", lambda figure: found.append(figure) or b"png"
    )
    return found


def test_the_plot_has_a_point_for_every_seed(tmp_path, figures):
    path = plot_table(made(tmp_path))
    assert path.read_bytes() == b"png"
    (axes,) = figures[0].axes
    points_of_rows = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [list(values) for values in points_of_rows] == [
        list(LOSSES["wide"]), list(LOSSES["plain"]), list(LOSSES["deep"])
    ]  # fmt: skip
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["wide", "plain (baseline)", "deep"]


@pytest.mark.parametrize("name", ["wide", "rates_of_the_10_percent_of_labels_from_random_weights"])
def test_long_names_leave_the_axes_of_the_plot_their_width(tmp_path, figures, name):
    study = Study(base=STUDY.base, variants={name: {}}, seeds=3)
    plot_table(made(tmp_path, {name: LOSSES["wide"]}, study))
    figures[0].draw_without_rendering()
    width = figures[0].axes[0].get_position().width * figures[0].get_figwidth()
    assert 5 < width < 6.5
