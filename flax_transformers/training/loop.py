"""The training loop: one for all objectives, models and meshes.

In order: where to start (``resume.start_or_resume``), one phase after another (``_run_phases``),
and in a phase step after step (``_run_phase``). Metrics of step N-1 are fetched after step N was
sent to the devices, which therefore never wait for the host.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh

from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.checkpointing.save_schedule import SaveSchedule
from flax_transformers.config_json import to_json
from flax_transformers.data.dataset import Dataset
from flax_transformers.errors import AgreedError, UserError
from flax_transformers.monitoring.example_log import ExampleLog
from flax_transformers.monitoring.file_sinks import JsonLines, TensorBoard
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Totals, read_metrics
from flax_transformers.monitoring.mixture_progress import MixtureProgress
from flax_transformers.monitoring.profiling import Profiling, Watch
from flax_transformers.monitoring.progress import Progress
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.monitoring.throughput import REMEDY, StepMetrics
from flax_transformers.optim.spike_detection import TooManySkipped
from flax_transformers.parallel.distributed import check_equal, compiled_together
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.storage.workdir import clear_side_files, open_workdir, workdir_lock
from flax_transformers.training.callbacks import Callback, Evaluator, Listeners, Snapshot
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.resume import (
    OnlineBatches,
    Run,
    StartPoint,
    StopPoint,
    roll_back,
    start_or_resume,
)
from flax_transformers.training.run_state import (
    RunPosition,
    checkpoint_meta,
    reason_to_stop_early,
    tokenizer_files,
    with_compute_of_run,
)
from flax_transformers.training.setup import checked_mesh, make_step_metrics, make_trainer
from flax_transformers.training.state import TrainState
from flax_transformers.training.stop import StopRequest

T = TypeVar("T")

log = logging.getLogger(__name__)

_ELSEWHERE = "train in another --workdir"


@dataclass(frozen=True)
class Outcome:
    """How training ended. ``preempted``: told to stop before the last step, by a signal;
    ``stopped``: by a callback. ``stopped_early``: why the run is through before its last step.
    ``told_to_stop``: by either, also after the last step, when only other runs can obey."""

    step: int
    preempted: bool
    metrics: dict[str, float]
    """The last value of every metric."""
    stopped: bool = False
    stopped_early: str | None = None
    told_to_stop: bool = False


def train_prepared(
    config: TrainConfig,
    prepared: Dataset,
    workdir: str | epath.Path,
    evaluators: Sequence[Evaluator] = (),
    initial: Callable[[Mesh], Any] | None = None,
    profiling: Profiling | None = None,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[MetricSink] = (),
    online: OnlineBatches | None = None,
) -> Outcome:
    """Trains to the end of the last phase, from the newest checkpoint in ``workdir`` if any.

    ``initial`` gives the parameters, on the mesh, that a run without a checkpoint starts from;
    without it they are drawn. ``sinks`` get the metrics too, and are closed at the end. ``online``:
    where batches come from that depend on the parameters, such as rollouts.

    Raises UserError for mistakes of the user, before anything in ``workdir`` is overwritten.
    """
    with opened(config, prepared, workdir, evaluators, profiling, callbacks, sinks, online) as run:
        with watchdog.phase("restore"):
            begun = start_or_resume(run, initial)
        ended, stopped, told = _run_to_end(run, begun)
    return outcome_of(run, ended, stopped, told)


@contextlib.contextmanager
def opened(
    config: TrainConfig,
    prepared: Dataset,
    workdir: str | epath.Path,
    evaluators: Sequence[Evaluator] = (),
    profiling: Profiling | None = None,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[MetricSink] = (),
    online: OnlineBatches | None = None,
    shown: bool = True,
) -> Iterator[Run]:
    """Sets the mesh of a run and locks its workdir. ``shown``: its progress is printed."""
    clock = Clock()
    mesh = checked_mesh(config)
    workdir = open_workdir(workdir)
    with (
        watchdog.running(config.limits, config.logging.hang_dump_s),
        watchdog.phase("prepare"),
        jax.set_mesh(mesh),
        workdir_lock(workdir),
    ):
        config = with_compute_of_run(config, workdir)
        if jax.process_index() == 0:
            clear_side_files(workdir)
        check_equal(
            "the prepared data",
            prepared.fingerprint,
            "prepare it once, into a --data.store that all machines share",
        )
        run = Run(
            config=config,
            prepared=prepared,
            workdir=workdir,
            mesh=mesh,
            trainer=make_trainer(config, mesh),
            checkpoints=Checkpoints(workdir / "checkpoints", config.retention),
            evaluators=evaluators,
            profiling=profiling or Profiling(),
            listeners=Listeners(callbacks, sinks, partial(_sinks, config, workdir, shown)),
            clock=clock,
            tokenizer_files=tokenizer_files(config, prepared),
            latest={},
            online=online,
        )
        try:
            yield run
        finally:
            with watchdog.phase("save"):
                run.checkpoints.close()


def outcome_of(run: Run, ended: StopPoint, stopped: bool = False, told: bool = False) -> Outcome:
    """How a run ended. Raises UserError if it is through without a finite loss."""
    step, total = ended.position.step, run.config.total_steps
    early = reason_to_stop_early(run.config, ended.position) if step < total else None
    is_through = step >= total or early is not None
    if is_through:
        require_finite_end(run.workdir, step, run.latest, ended.diverging_steps)
    halted = stopped and not is_through
    return Outcome(step, not (is_through or stopped), dict(run.latest), halted, early, told)


def _run_to_end(run: Run, begun: StartPoint) -> tuple[StopPoint, bool, bool]:
    """Trains to the end or to a requested stop, and rolls back where steps diverge.

    Also returns whether a callback requested the stop that ended it, and whether any was requested.
    """
    total = run.config.total_steps
    with (
        StopRequest() as stop,
        watchdog.phase("step"),
        run.listeners.training(begun.position.step, total),
    ):
        ended = _run_phases(run, begun, stop)
        while ended.diverged:
            with watchdog.phase("restore"):
                begun = roll_back(run, ended)
            ended = _run_phases(run, begun, stop)
        return ended, stop.obeyed and stop.by_callback(), stop.requested


def _run_phases(run: Run, begun: StartPoint, stop: StopRequest) -> StopPoint:
    """Trains to the end, to a requested stop, or to where the run has to roll back."""
    config, state, position, totals = run.config, begun.state, begun.position, begun.totals
    diverging_steps, saves = begun.diverging_steps, SaveSchedule(config.checkpoints.every_steps)
    consumed: dict[int, int] = {}
    if run.is_writer:
        run.clock.resume(read_metrics(run.workdir), position.step)
    with run.listeners.writing(position.step):
        if begun.unevaluated:
            make_up_evaluation(run, state, position)
        early = reason_to_stop_early(config, position)
        while position.step < config.total_steps and not stop.obeyed and early is None:
            position = position.normalized(config)
            try:
                state, diverging_steps = _run_phase(run, state, position, totals, saves, stop)
            except TooManySkipped:
                if position.rollbacks >= config.max_rollbacks:
                    raise
                return StopPoint(position, True, 0, consumed | {position.phase: position.examples})
            consumed[position.phase], totals = position.examples, {}
            early = reason_to_stop_early(config, position)
    return StopPoint(position, False, diverging_steps, consumed)


def _sinks(config: TrainConfig, workdir: epath.Path, shown: bool, step: int) -> list[MetricSink]:
    """Those that the config asks for, for rows after ``step``."""
    sinks: list[MetricSink] = [JsonLines(workdir, step)]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(workdir, step))
    sinks += [sink.open(workdir, step) for sink in config.logging.sinks]
    return [*sinks, Progress(config.total_steps, step)] if shown else sinks


def _run_phase(
    run: Run,
    state: TrainState,
    position: RunPosition,
    totals: Totals,
    saves: SaveSchedule,
    stop: StopRequest,
) -> tuple[TrainState, int]:
    """Trains to the end of the phase at ``position``, which moves along, or to a requested stop.

    Returns the state, and how many steps in a row, up to the last one, were skipped for values that
    are not finite.
    """
    config, phase, listeners = run.config, run.config.phases[position.phase], run.listeners
    train_step = run.trainer.train_step(phase.micro_batches)
    take_step = compiled_together(train_step)
    evaluation_step = compiled_together(run.trainer.evaluation_step())
    step_metrics = make_step_metrics(config, phase, run.mesh, run.clock, totals)
    mixture = MixtureProgress(config.objective, config.phases, run.prepared, position.phase)
    with (
        run.batches(position, lambda: state) as batches,
        ExampleLog(run.workdir, position.step) as example_log,
        Watch(run.profiling, run.workdir, position.phase) as watch,
    ):
        stopping = False
        while not position.done(config) and not stopping:
            with step_metrics.waiting():
                batch, ids = _saving_first(
                    run, state, position, step_metrics, partial(next, batches)
                )
            watch.before(position.step + 1, train_step, state, batch)
            with jax.transfer_guard("disallow"):
                state, report = take_step(state, batch)
                position.examples += phase.batch_size
                step_metrics.fetch_previous()
            step_metrics.sent(report)
            position.step += 1
            if config.logging.example_log:
                example_log.write(position.step, ids)
            listeners.step(position.step, state)
            last = position.done(config)
            if last or position.step % config.logging.every_steps == 0:
                row = step_metrics.row(position.step) | mixture.row(position.examples)
                run.latest.update(row)
                listeners.metrics(position.step, row)
            best, early = False, None
            position.evaluation_pending |= position.evaluation_is_due(config)
            if position.evaluation_pending:
                with step_metrics.paused("evaluation"), watchdog.phase("evaluation"):
                    if not step_metrics.consecutive_skips or position.step == config.total_steps:
                        best = _saving_first(
                            run, state, position, step_metrics,
                            partial(evaluate_run, run, state, position, phase, evaluation_step),
                        )  # fmt: skip
                        early = reason_to_stop_early(config, position)
            stopping = stop.check(run.checkpoints, position.step, listeners.stop_reason)
            if early is not None:
                log.info("training ends early, at step %d: %s", position.step, early)
                stopping = True
            if saves.is_due(position.step, further=last or best) or stopping:
                with step_metrics.paused("checkpoint"), watchdog.phase("save"):
                    listeners.flush()  # metrics of the steps that the checkpoint holds
                    example_log.flush()
                    if save(run, state, position, step_metrics, stopping):
                        saves.saved()
    return state, step_metrics.diverging_steps


def _saving_first(
    run: Run,
    state: TrainState,
    position: RunPosition,
    step_metrics: StepMetrics,
    call: Callable[[], T],
) -> T:
    """The result of ``call``. If it raises UserError, the steps before are saved first.

    Of several processes one may fail alone while the others go on, and saving would wait for them:
    there only an AgreedError is saved for.
    """
    try:
        return call()
    except UserError as error:
        if jax.process_count() > 1 and not isinstance(error, AgreedError):
            raise
        if position.step:
            with watchdog.phase("save"):
                run.listeners.flush()
                step_metrics.fetch_previous()
                save(run, state, position, step_metrics, stopping=True)
        raise


def evaluate_run(
    run: Run, state: TrainState, position: RunPosition, phase: AnyPhase, step: Callable[..., Any]
) -> bool:
    """Evaluates, and returns whether the scores are the best so far. Raises UserError."""
    params, functions = run.trainer.model_params(state), run.trainer.functions
    snapshot = Snapshot(position.step, params, phase, run.mesh, functions, step)
    position.evaluation_pending = False
    row: dict[str, float] = {}
    for evaluator in run.evaluators:
        watchdog.progress()
        row |= evaluator(snapshot)
    run.latest.update(row)
    run.listeners.metrics(position.step, row, scores=True)
    return position.evaluated(run.config, row)


def make_up_evaluation(run: Run, state: TrainState, position: RunPosition) -> None:
    """Evaluates the step of a checkpoint that lacks its evaluation, and adds the scores to its
    meta. Raises UserError."""
    log.info("evaluating step %d, whose evaluation is missing", position.step)
    phases = run.config.phases
    phase = phases[min(position.phase, len(phases) - 1)]
    run.clock.lap("start")
    with watchdog.phase("evaluation"):
        step = compiled_together(run.trainer.evaluation_step())
        evaluate_run(run, state, position, phase, step)
        run.clock.lap("evaluation")
    with watchdog.phase("save"):
        run.listeners.flush()
        scored = {"metrics": dict(run.latest), "evaluations": position.evaluations}
        run.checkpoints.update_meta(position.step, scored | {"config": to_json(run.config)})


def save(
    run: Run, state: TrainState, position: RunPosition, step_metrics: StepMetrics, stopping: bool
) -> bool:
    """Saves a checkpoint, and returns whether it did.

    While steps are skipped, which may be the start of a divergence, only the end of the run or a
    stop is saved, with ``consecutive_skips`` in its meta.
    """
    skips, ends = step_metrics.consecutive_skips, position.step == run.config.total_steps
    if skips and not (ends or stopping):
        log.warning("step %d is not saved: the last %d step(s) were skipped", position.step, skips)
        return False
    meta = checkpoint_meta(
        run.config,
        run.prepared,
        position,
        run.latest,
        step_metrics.totals,
        consecutive_skips=skips,
        diverging_steps=step_metrics.diverging_steps,
    )
    run.checkpoints.save(position.step, state, meta, files=run.tokenizer_files)
    run.listeners.checkpoint(position.step, run.checkpoints.directory / str(position.step))
    return True


def require_finite_end(
    workdir: epath.Path, step: int, metrics: Mapping[str, float], skips: int
) -> None:
    """Raises UserError if a run that is through has no finite loss at its end.

    ``metrics`` are the last values, and ``skips`` the steps in a row, up to the last one, that were
    skipped for values that are not finite.

    That is, every step was skipped, more than the last step was skipped, or the last loss is not
    finite. If only the last step was skipped, a warning is logged. The last state is saved in every
    case, so that running again ends the same way.
    """
    where = f"the run in {workdir} ended at step {step}"
    if skips and "train/loss" not in metrics:
        raise UserError(
            f"{where} without a finite loss: every step was skipped; {REMEDY}, and {_ELSEWHERE}"
        )
    if skips > 1:
        raise UserError(
            f"{where} without a finite loss: the last {skips} steps were skipped, as their values "
            "are not finite, and its last checkpoint holds the parameters from before them; "
            f"{REMEDY}, and raise phases.*.steps to train further, or {_ELSEWHERE}"
        )
    losses = ("train/loss", "eval/loss")
    wrong = [name for name in losses if not math.isfinite(metrics.get(name, 0.0))]
    if wrong:
        raise UserError(
            f"{where} with {' and '.join(wrong)} not finite: do not use its last checkpoint; "
            f"{REMEDY}, and {_ELSEWHERE}"
        )
    if skips:
        log.warning(
            "the last step, %d, was skipped, as its values are not finite; the last checkpoint "
            "holds the parameters from before it",
            step,
        )
