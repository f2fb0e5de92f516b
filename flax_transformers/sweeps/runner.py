"""Trains the runs of a sweep, and reads what finished runs have left.

Each training has a file ``sweep.json`` in its workdir: the config as the sweep gave it, the folder
of the sweep, and the step at which it finished or the sentence that says why it failed. That of the
sweep has the base config and the workdirs that the runs end in. Scores are read from the run's own
files, so that parts of a sweep need neither locks nor each other.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import jax
from etils import epath

from flax_transformers import run as runs
from flax_transformers import runtime
from flax_transformers.checkpointing.step_directories import few, finished_steps
from flax_transformers.config_json import to_json
from flax_transformers.errors import UserError, WorkdirInUse
from flax_transformers.evaluation.report import say
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.storage.workdir import read_side_file, write_side_file
from flax_transformers.sweeps.study import (
    Point,
    StudyRun,
    StudyRuns,
    Training,
    option_fields,
    value_of,
)
from flax_transformers.sweeps.together import (
    NotTogether,
    check_equal_configs,
    check_together,
    train_together,
)
from flax_transformers.training import loop
from flax_transformers.training.check_run import check_config
from flax_transformers.training.config import TrainConfig, check_resumable
from flax_transformers.training.setup import checked_mesh

T = TypeVar("T")

log = logging.getLogger(__name__)

RECORD = "sweep.json"
_FREE = ("checkpoints", "limits", "logging", "mesh", "platform")
_DEFINING = tuple(name for name in TrainConfig.__dataclass_fields__ if name not in _FREE)
"""What identifies a run of a sweep: all that its score can depend on."""
_FREE_WITHIN = re.compile(
    r"data\.(store|prepare_processes|workers|verify)|checkpoints\.(?!best_).*"
)
"""Finished runs do not open their data, so that no fingerprints are compared, only fields."""
_FREE_WITHIN_EARLIER = re.compile(rf"{_FREE_WITHIN.pattern}|evaluation\.batch_size")
"""Of records without a folder: earlier versions set no options in configs of functions."""


@dataclass(frozen=True)
class Result:
    """What a run has left so far."""

    run: StudyRun
    metrics: dict[str, float] = field(default_factory=dict)
    """Those that are compared, see `_scores`; empty if the run is not finished."""
    failure: str | None = None
    """Why it failed, in one sentence."""


def check(sweep: StudyRuns, *, together: bool = False) -> None:
    """Raises UserError, before the first run, for a grid point that cannot be trained, or not
    ``together``, and for a folder that holds something else."""
    record = _read(sweep.folder) or {}
    base = record.get("base")
    if base is None and (sweep.folder / "config.json").exists():
        raise UserError(f"{sweep.folder} holds a single run; choose another --workdir")
    if base is not None:
        _check_same(base, sweep.study.base, str(sweep.folder))
    for point in sweep.points:
        _check_point(point, sweep.study.base)
    for run in sweep.runs:
        for training in run.trainings:
            _check_workdir(training, run.trainings[0].workdir)
            if together:
                check_together(training.config)
    _warn_of_other_values(sweep)
    known = record.get("runs", [])  # a smaller grid does not remove runs
    runs = list(dict.fromkeys([*known, *(run.trainings[-1].workdir.name for run in sweep.runs)]))
    if runs != known and jax.process_index() == 0:
        base = to_json(_with_mode(sweep.study.base)) if base is None else base
        write_side_file(sweep.folder / RECORD, _json({"base": base, "runs": runs}))


def _warn_of_other_values(sweep: StudyRuns) -> None:
    """Names the fields that were set for all runs, and the runs that have another value."""
    runs, base = sweep.runs, sweep.study.base
    for name in option_fields(sweep.overrides):
        own = {"seed": 0, "init_from": 1}.get(name)  # which is set in each run, or in fine-tuning
        trainings = [training for run in runs for training in run.trainings[:own]]
        value = value_of(base, name)
        others = [one.workdir.name for one in trainings if value_of(one.config, name) != value]
        if others:
            log.warning(
                "--%s is not set in %s, where the study or --grid sets another value",
                name.replace("_", "-"),
                few(others),
            )


def _check_point(point: Point, base: TrainConfig) -> None:
    try:
        config = runtime.with_initial_model(point.config, point.overrides)
        if point.config.init_from == base.init_from:
            _check_model(base.model, point.config.model, config.model)
        checked_mesh(config)
        check_config(config)
    except UserError as error:
        raise UserError(f"grid point {point.name or 'of the config'}: {error}") from error


def _check_model(base: Any, wanted: Any, found: Any) -> None:
    """``wanted``: the model of a point; ``found``: the one that is trained, which has the fields of
    published weights. Raises UserError for a field that differs from ``base`` and is not kept."""
    for one in fields(wanted):
        if one.name == "generation":  # which the config sets
            continue
        ours, theirs = getattr(wanted, one.name), getattr(found, one.name, None)
        if ours != theirs and ours != getattr(base, one.name, None):
            raise UserError(
                f"model.{one.name} {ours!r} has no effect, as the weights of init_from have "
                f"{theirs!r}; leave the point out, or set init_from to other weights"
            )


def _check_same(
    saved: Any, config: TrainConfig, where: str, free: re.Pattern[str] = _FREE_WITHIN
) -> None:
    stopping, defining = config.early_stopping, _DEFINING
    config = _with_mode(config)
    if stopping.patience is not None and stopping.metric is None:
        defining = (*_DEFINING, "checkpoints")  # whose best metric decides where a run stops
    check_resumable(saved, config, where, defining, free)


def _with_mode(config: TrainConfig) -> TrainConfig:
    """With the mode of the best metric, which earlier versions always wrote."""
    kept = config.checkpoints
    return replace(config, checkpoints=replace(kept, best_mode=kept.mode))


def _check_workdir(training: Training, first: epath.Path) -> None:
    """The workdir has no checkpoint of another run than this one. ``first``: that of its first
    training."""
    saved = _read(training.workdir)
    if saved is not None:
        started = saved.get("finished_step") or finished_steps(training.workdir / "checkpoints")
        if not started:  # its config may have been corrected
            return
        config, folder, where = saved.get("config"), saved.get("folder"), str(training.workdir)
        is_first = training.workdir == first
        moved = config if folder is None and is_first else _moved(config, folder, first)
        free = _FREE_WITHIN_EARLIER if folder is None else _FREE_WITHIN
        try:
            _check_same(config, training.config, where, free)
        except UserError:
            if moved == config:
                raise
            _check_same(moved, training.config, where, free)
    elif (training.workdir / "config.json").exists():
        raise UserError(
            f"{training.workdir} holds a run that no sweep has started; choose another --workdir, "
            "or move this folder away"
        )


def _moved(saved: Any, folder: str | None, first: epath.Path) -> Any:
    """A JSON config with its paths in ``folder``, which the sweep was in, in its present folder.

    None, of a record of an earlier version: the paths that have a folder called as the workdir
    ``first`` lead to this one.
    """
    if isinstance(saved, dict):
        return {name: _moved(value, folder, first) for name, value in saved.items()}
    if isinstance(saved, list):
        return [_moved(value, folder, first) for value in saved]
    if not isinstance(saved, str):
        return saved
    if folder is not None:
        inside = saved == folder or saved.startswith(f"{folder}/")
        return f"{first.parent}{saved[len(folder) :]}" if inside else saved
    parts = saved.split("/")
    if first.name not in parts:
        return saved
    return "/".join([str(first), *parts[parts.index(first.name) + 1 :]])


def train_all(todo: Sequence[StudyRun], *, together: bool = False) -> bool:
    """Trains those of the runs that are not finished, in order; False if told to stop.

    ``together``: the seeds of a point by one program, where they differ in nothing else. A run that
    fails is recorded, and the next one begins. In a job of several processes a failure ends the
    job, as the processes would lose each other.
    """
    begun = 0
    for group in _by_point(todo) if together else [[run] for run in todo]:
        first, begun = begun + 1, begun + len(group)
        which = f"run {first}" if len(group) == 1 else f"runs {first} to {begun}"
        _say(f"{which} of {len(todo)}: {', '.join(run.name for run in group)}")
        if not _train_group(group):
            return False
    return True


def _by_point(runs: Sequence[StudyRun]) -> list[list[StudyRun]]:
    """The runs of each point, points in the order of their first run."""
    found: dict[str, list[StudyRun]] = defaultdict(list)
    for run in runs:
        found[run.point.name].append(run)
    return list(found.values())


def _train_group(group: Sequence[StudyRun]) -> bool:
    """Trains the runs of a point: first all first trainings, then all second ones. False if told to
    stop. A run whose first training fails has no second one."""
    for stage in range(len(group[0].trainings)):
        trainings = [run.trainings[stage] for run in group]
        todo = [one for one in trainings if not _scores(one)]
        if len(todo) < len(group):
            _say(
                "finished before"
                if len(group) == 1
                else f"{len(group) - len(todo)} of them finished before"
            )
        outcomes = dict(zip([one.workdir for one in todo], _train(todo), strict=True))
        if any(one and (one.preempted or one.told_to_stop) for one in outcomes.values()):
            return False
        group = [run for run in group if outcomes.get(run.trainings[stage].workdir, True)]
        if not group:
            break
    return True


def _train(trainings: Sequence[Training]) -> list[loop.Outcome | None]:
    """The outcomes of trainings, by one program where that is possible; see `_guarded`."""
    if len(trainings) > 1:
        try:
            check_equal_configs([one.config for one in trainings])
            return _train_together(trainings)
        except NotTogether as error:
            _say(f"one after another, as {error}")
    found: list[loop.Outcome | None] = []
    for one in trainings:
        _record(one)
        train = partial(runs.train, one.config, one.workdir, overrides=one.overrides)
        found.append(_guarded(one, train))
        if found[-1] and (found[-1].preempted or found[-1].told_to_stop):
            break  # before the others begin
    return found + [None] * (len(trainings) - len(found))


def _train_together(trainings: Sequence[Training]) -> list[loop.Outcome | None]:
    ready: dict[int, runs.ReadyRun] = {}
    for index, one in enumerate(trainings):
        _record(one)
        make = partial(runs.make_ready, one.config, one.workdir, overrides=one.overrides)
        if (made := _guarded(one, make)) is not None:
            ready[index] = made
    found: list[loop.Outcome | None] = [None] * len(trainings)
    try:
        outcomes = train_together(list(ready.values()))
    except NotTogether:
        raise
    except Exception as error:
        outcomes = [error] * len(ready)
    for (index, made), outcome in zip(ready.items(), outcomes, strict=True):
        _say(trainings[index].workdir.name)
        found[index] = _guarded(trainings[index], partial(_finish, made, outcome))
    return found


def _finish(run: runs.ReadyRun, outcome: loop.Outcome | Exception) -> loop.Outcome:
    if isinstance(outcome, Exception):
        raise outcome
    runs.finish(run, outcome)
    return outcome


def _guarded(training: Training, call: Callable[[], T]) -> T | None:
    """The result of a call, recorded if it is the outcome of a ``training``; None if it failed, or
    another process trains it."""
    try:
        found = call()
        if isinstance(found, loop.Outcome) and not found.preempted:
            _record(training, step=found.step)
        return found
    except WorkdirInUse as error:
        _say(f"left out: {error}")
    except Exception as error:  # whatever it is, the other runs may be fine
        if jax.process_count() > 1:
            raise
        if not isinstance(error, UserError):
            log.exception("%s failed", training.workdir)
        _record(training, _sentence(error))
        _say(f"failed: {_sentence(error)}")
    return None


def results(sweep: StudyRuns) -> list[Result]:
    """What the runs of a sweep have left, without those that have neither finished nor failed."""
    found = (_result(run) for run in sweep.runs)
    return [one for one in found if one.metrics or one.failure]


def _result(run: StudyRun) -> Result:
    for training in run.trainings:
        saved = _read(training.workdir) or {}
        if saved.get("failure"):
            return Result(run, failure=str(saved["failure"]))
        scores = _scores(training)
        if not scores:
            return Result(run)
    return Result(run, scores)


def _scores(training: Training) -> dict[str, float]:
    """The metrics of a finished training's last step; empty if it is not finished.

    With early stopping, those of the best evaluation, whose step is kept as the best checkpoint.
    """
    end = (_read(training.workdir) or {}).get("finished_step")
    if end not in finished_steps(training.workdir / "checkpoints"):
        return {}
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for row in read_metrics(training.workdir):
        rows[row["step"]] |= row
    if training.config.early_stopping.patience is None:
        return rows[end]
    metric, mode = training.config.stopping_metric
    scored = [row for row in rows.values() if math.isfinite(row.get(metric, math.nan))]
    best = min if mode == "min" else max
    return best(scored, key=lambda row: row[metric], default={})


def _record(training: Training, failure: str | None = None, step: int | None = None) -> None:
    if jax.process_index() == 0:
        config = to_json(_with_mode(training.config))
        content = {"config": config, "folder": str(training.workdir.parent)}
        content |= {"finished_step": step, "failure": failure}
        write_side_file(training.workdir / RECORD, _json(content))


def _read(folder: epath.Path) -> dict[str, Any] | None:
    """The record of a folder; None if there is none, or it is damaged."""
    try:
        found = json.loads(read_side_file(folder / RECORD) or "")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:300]}"


def _say(text: str) -> None:
    if jax.process_index() == 0:
        say(text)
