"""The ranked table of a sweep: in the terminal, and as table.csv, table.jsonl and table.md."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath
from rich.table import Table as RichTable

from flax_transformers.errors import UserError
from flax_transformers.evaluation.saved_baselines import read_baselines
from flax_transformers.storage.workdir import write_text
from flax_transformers.sweeps.runner import Result
from flax_transformers.sweeps.statistics import (
    EXACT_PAIRS,
    Comparison,
    Summary,
    compare,
    holm,
    sign_flip_test,
    summary,
)
from flax_transformers.sweeps.study import Point, StudyRuns

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class TableRow:
    """One point: its values by seed, and how they compare with those of the others."""

    point: Point
    values: Mapping[int, float]
    scores: Summary
    against_baseline: Comparison | None
    """None for the baseline itself, and without a common seed; so is the next."""
    against_best: Comparison | None


@dataclass(frozen=True)
class Table:
    """All points that have a finished run, best median first, and the runs that failed."""

    sweep: StudyRuns
    rows: tuple[TableRow, ...]
    trivial: Mapping[str, float]
    """Scores without a model, such as that of the most frequent class: means over the runs."""
    failures: Mapping[str, str]
    """Why runs failed, by name."""


def make_table(sweep: StudyRuns, results: Sequence[Result]) -> Table:
    """The table of the results so far.

    Raises UserError without a finished run, and for a metric that none of the runs has.
    """
    study, values = sweep.study, defaultdict[str, dict[int, float]](dict)
    _check_metric(results, study.metric)
    failures: dict[str, str] = {}
    for result in results:
        if result.failure is not None:
            failures[result.run.name] = result.failure
            continue
        score = result.metrics.get(study.metric)
        if score is None:
            failures[result.run.name] = f"{study.metric} is not among its scores"
        elif math.isfinite(score):
            values[result.run.point.name][result.run.seed] = score
        else:
            failures[result.run.name] = f"{study.metric} is not finite"
    if not values:
        failed = f"; {len(failures)} failed" if failures else ""
        raise UserError(
            f"no run of this sweep is finished in {sweep.folder}{failed}; give --report after the "
            "first one"
        )
    sign = -1 if study.higher_is_better else 1
    scores = {name: summary(list(own.values())) for name, own in values.items()}
    ranked = sorted(values, key=lambda name: sign * scores[name].median)
    best, baseline = ranked[0], sweep.baseline.name
    to_best = compare(values, best)
    to_baseline = compare(values, baseline) if baseline in values else {}
    by_name = {point.name: point for point in sweep.points}
    rows = [
        TableRow(
            by_name[name], values[name], scores[name], to_baseline.get(name), to_best.get(name)
        )
        for name in ranked
    ]
    return Table(sweep, tuple(rows), _trivial(results, study.metric), failures)


def _check_metric(results: Sequence[Result], metric: str) -> None:
    finished = [result for result in results if result.failure is None]
    if finished and not any(metric in result.metrics for result in finished):
        known = sorted(name for name in finished[0].metrics if name.startswith("eval/"))
        raise UserError(
            f"--metric {metric} is not among the scores of {finished[0].run.name}: "
            f"{', '.join(known)}"
        )


def _trivial(results: Sequence[Result], metric: str) -> dict[str, float]:
    scores: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for one in read_baselines(result.run.trainings[-1].workdir):
            if one.metric == metric:
                scores[one.name].append(one.score)
    return {name: statistics.fmean(found) for name, found in scores.items()}


def notes(table: Table) -> list[str]:
    """What a reader has to know to read the table, a sentence each."""
    study = table.sweep.study
    better = "higher" if study.higher_is_better else "lower"
    pairs = max(row.scores.n for row in table.rows)
    signs = "exact" if pairs <= EXACT_PAIRS else "over drawn signs"
    finished, failed = sum(row.scores.n for row in table.rows), len(table.failures)
    count = f"{finished} of {len(table.sweep.runs)} runs are finished"
    found = [
        f"{study.metric}: {better} is better; ranked by the median.",
        "Differences are means over equal seeds; p by a two-sided permutation test of their signs, "
        f"{signs}, and Holm's correction for the number of comparisons in its column.",
    ]
    if 2 / 2**pairs > SIGNIFICANT:
        found.append(
            f"With {pairs} seed(s) no p can be below {2 / 2**pairs:.3g}: give more --seeds to find "
            "a difference significant."
        )
    return [*found, *_expectations(table), f"{count}, {failed} failed." if failed else f"{count}."]


def _expectations(table: Table) -> list[str]:
    """A sentence for each expected pair: whether the published direction is seen."""
    by_name = {row.point.name: row.values for row in table.rows}
    sign = 1 if table.sweep.study.higher_is_better else -1
    gains = {}
    for better, worse in table.sweep.study.expected:
        ours, theirs = by_name.get(better, {}), by_name.get(worse, {})
        if seeds := sorted(ours.keys() & theirs.keys()):
            gains[better, worse] = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    corrected = holm([sign_flip_test(own) for own in gains.values()])
    found = []
    for ((better, worse), own), p in zip(gains.items(), corrected, strict=True):
        mean, wins = statistics.fmean(own), sum(gain > 0 for gain in own)
        if mean <= 0:
            verdict = "the published direction does not appear"
        elif p >= SIGNIFICANT:
            verdict = "the published direction, not significant"
        else:
            verdict = "the published direction"
        found.append(
            f"{better} against {worse}: better by {mean:.4g} on average, in {wins} of {len(own)} "
            f"seeds, p {p:.3g}: {verdict}."
        )
    return found


_HEADER = (
    "rank", "point", "n", "median", "min to max", "mean ± sd", "to baseline", "p", "to best", "p",
)  # fmt: skip


def cells(table: Table) -> list[list[str]]:
    """The table as text: a row for each point, then one for each score without a model."""
    found = []
    for rank, row in enumerate(table.rows, 1):
        own = row.scores
        spread = f" ± {own.sd:.2g}" if own.n > 1 else ""
        name = row.point.name or "config"
        is_baseline = row.point.name == table.sweep.baseline.name
        found.append(
            [
                *(str(rank), f"{name} (baseline)" if is_baseline else name, str(own.n)),
                *(f"{own.median:.5g}", f"{own.low:.5g} to {own.high:.5g}"),
                *(f"{own.mean:.5g}{spread}", *_compared(row.against_baseline)),
                *_compared(row.against_best),
            ]
        )
    for name, score in table.trivial.items():
        found.append(["", f"without a model: {name}", "", "", "", f"{score:.5g}", *[""] * 4])
    return found


def _compared(one: Comparison | None) -> tuple[str, str]:
    return ("", "") if one is None else (f"{one.difference:+.2g}", f"{one.corrected_p:.3g}")


def terminal_table(table: Table) -> RichTable:
    """For rich's console."""
    made = RichTable(*_HEADER, box=None, pad_edge=False)
    for column, header in zip(made.columns, _HEADER, strict=True):
        column.justify = "left" if header == "point" else "right"
        column.no_wrap = header in ("point", "p")
    for row in cells(table):
        made.add_row(*row)
    return made


def write_table(table: Table) -> list[epath.Path]:
    """Writes table.csv, table.jsonl and table.md to the sweep's folder; returns their paths."""
    records = [_record(rank, row) for rank, row in enumerate(table.rows, 1)]
    trivial = [{"point": f"without a model: {n}", "mean": s} for n, s in table.trivial.items()]
    contents = {
        "table.csv": _csv([*records, *trivial], table),
        "table.jsonl": "".join(json.dumps(one) + "\n" for one in [*records, *trivial]),
        "table.md": markdown(table),
    }
    for name, text in contents.items():
        write_text(table.sweep.folder / name, text)
    return [table.sweep.folder / name for name in contents]


def _record(rank: int, row: TableRow) -> dict[str, Any]:
    scores = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(row.scores).items()
    }
    found = {"rank": rank, "point": row.point.name, **row.point.settings, **scores}
    for name, one in (("baseline", row.against_baseline), ("best", row.against_best)):
        fields = dataclasses.asdict(one) if one is not None else {}
        for figure in ("difference", "p", "corrected_p"):
            found[f"{figure}_to_{name}"] = fields.get(figure)
    return found | {"values": {str(seed): value for seed, value in row.values.items()}}


def _csv(records: Sequence[Mapping[str, Any]], table: Table) -> str:
    """One line for each record; the values of the seeds have columns of their own."""
    flat = [
        {name: value for name, value in one.items() if name != "values"}
        | {f"seed_{seed}": value for seed, value in one.get("values", {}).items()}
        for one in records
    ]
    text = io.StringIO()
    columns = list(dict.fromkeys(name for one in flat for name in one))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def markdown(table: Table) -> str:
    """The table with its notes, and with the published effect of the study."""
    study = table.sweep.study
    lines = [f"| {' | '.join(row)} |" for row in [_HEADER, ["---"] * len(_HEADER), *cells(table)]]
    found = ["\n".join(lines), "\n".join(f"- {note}" for note in notes(table))]
    if study.published:
        source = f" ({study.citation})" if study.citation else ""
        found.append(f"Published: {study.published}{source}")
    if table.failures:
        failed = [f"- {name}: {sentence}" for name, sentence in table.failures.items()]
        found.append("\n".join(["Failed runs:", "", *failed]))
    return "\n\n".join(found) + "\n"
