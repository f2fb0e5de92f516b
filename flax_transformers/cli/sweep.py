"""``flax-transformers sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction

from flax_transformers.cli.parsing import Flag, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.ranges import integers, parse_integer

if TYPE_CHECKING:
    from flax_transformers.sweeps.study import Study
    from flax_transformers.sweeps.study import StudyRuns as Runs

_FILE_WIDTH = 160
"""Characters of a line of the table where stdout is not a terminal."""


@dataclass(frozen=True)
class Sweep:
    """Train a grid of configs with several seeds each, and rank them in a table with a plot.

    Any field of the config can be set for all runs, as in --optimizer.schedule.warmup-steps 50;
    "train CONFIG --help" lists all of them. A warning names runs that the study, or --grid, gives
    another value. Each run has a workdir of its own below --workdir. The same command resumes,
    skips finished runs and tries failed ones again; more values or seeds add runs. A run that fails
    does not stop the others; the exit code is then 2.
    """

    study: Positional[Annotated[str, option("STUDY|CONFIG")]]
    """A file with get_study(), such as studies/masking.py; or a config file, or a recipe's name."""
    workdir: Annotated[str | None, option("DIR")] = None
    """Folder or bucket for the workdirs of all runs, table.md, table.csv, table.jsonl, plot.png."""
    grid: Annotated[UseAppendAction[tuple[str, ...]], option("FIELD=VALUE,VALUE")] = ()
    """A config field and its values, as in optimizer.learning_rate=2e-5,3e-5. Several --grid make
    all combinations. In a value, blanks separate the items of a tuple."""
    seeds: Annotated[int | None, number("--seeds", integers(1, 10_000))] = None
    """Number of runs of each grid point (default: that of the study, or 1)."""
    metric: Annotated[str | None, option("NAME")] = None
    """The score that is compared, as in metrics.jsonl (default: that of the study, or
    eval/loss)."""
    maximize: Flag = False
    """Higher values of the metric are better (default: known from its name)."""
    minimize: Flag = False
    """Lower values of the metric are better."""
    baseline: Annotated[str | None, option("POINT")] = None
    """Grid point that all others are compared with (default: that of the study, or the first)."""
    only: Annotated[str | None, option("INDEX/COUNT")] = None
    """Train every COUNT-th run, from number INDEX on, from 0. For array jobs; in SLURM's:
    $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT."""
    together: Flag = False
    """Train the seeds of each point at the same time, by one program: for models so small that one
    run does not fill a GPU or TPU. Scores differ by rounding."""
    report: Flag = False
    """Train nothing, and write table and plot of the runs that are finished."""

    def run(self, overrides: Sequence[str]) -> int:
        if self.workdir is None:
            raise UserError("--workdir is missing; name a folder for the runs and the table")
        if self.maximize and self.minimize:
            raise UserError("--maximize and --minimize exclude each other; give one of them")
        part = _part(self.only)

        import jax

        from flax_transformers import runtime
        from flax_transformers.parallel.distributed import PREEMPTED
        from flax_transformers.sweeps import runner

        sweep = self._sweep(overrides)
        if not self.report:
            config = sweep.study.base
            runtime.start(config.platform, config.limits)
            runner.check(sweep, together=self.together)
            if not runner.train_all(sweep.runs[part], together=self.together):
                return PREEMPTED
        if jax.process_index() == 0:
            _report(sweep, [run.name for run in sweep.runs[part]], required=self.report)
        return 0

    def _sweep(self, overrides: Sequence[str]) -> Runs:
        from flax_transformers.cli.config_file import load_study
        from flax_transformers.storage.workdir import open_workdir
        from flax_transformers.sweeps import study as studies

        assert self.workdir is not None
        study = self._study(load_study(self.study, overrides))
        _ = study.higher_is_better  # raises if the direction of the metric is not known
        points = studies.points(study, studies.grid_axes(self.grid), override, overrides)
        baseline = studies.baseline_of(study, points, self.baseline)
        folder = open_workdir(self.workdir)
        return studies.StudyRuns(study, tuple(points), baseline, folder, tuple(overrides))

    def _study(self, study: Study) -> Study:
        """``study`` with what was given on the command line."""
        if self.seeds is not None:
            study = replace(study, seeds=self.seeds)
        if self.metric is not None:
            study = replace(study, metric=self.metric, maximize=None)
        if self.maximize or self.minimize:
            study = replace(study, maximize=self.maximize)
        return study


def _part(text: str | None) -> slice:
    """The runs of ``INDEX/COUNT``."""
    if text is None:
        return slice(None)
    index, count = (parse_integer(part) for part in text.partition("/")[::2])
    if index is None or count is None or not 0 <= index < count:
        raise UserError(
            f"--only {text} is not INDEX/COUNT with INDEX from 0 and below COUNT, as in 0/8"
        )
    return slice(index, None, count)


def _report(sweep: Runs, own: Sequence[str], *, required: bool) -> None:
    """Writes and prints the table of all finished runs. Raises UserError if one of the runs ``own``
    has failed, and if a table is ``required`` and there is none."""
    from rich.console import Console

    from flax_transformers.sweeps.plot import plot_table
    from flax_transformers.sweeps.runner import results
    from flax_transformers.sweeps.table import make_table, notes, terminal_table, write_table

    found = results(sweep)
    failed = {one.run.name: one.failure for one in found if one.failure and one.run.name in own}
    if not any(one.metrics for one in found) and not failed and not required:
        print("no run of this sweep is finished yet")  # a part without a run, or others train them
        return
    if all(one.failure for one in found) and failed:
        raise UserError(_failures(failed, len(own)))
    table = make_table(sweep, found)
    files = [*write_table(table), plot_table(table)]
    console = Console(markup=False, emoji=False)  # values may be in brackets
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = _FILE_WIDTH
    console.print(terminal_table(table), highlight=False)
    for note in notes(table):
        console.print(note, highlight=False, markup=False)
    console.print("\n".join(map(str, files)), highlight=False, soft_wrap=True)
    if failed := {name: why for name, why in table.failures.items() if name in own}:
        raise UserError(_failures(failed, len(own)))


def _failures(failed: dict[str, str], runs: int) -> str:
    name, sentence = next(iter(failed.items()))
    return (
        f"{len(failed)} of {runs} runs failed, and the same command tries them again; {name}: "
        f"{sentence}"
    )
