"""The training loop: one for all objectives, models and meshes.

In order: where to start (``start``), one phase after another (``_run_phases``), and in a phase step
after step (``_run_phase``). Metrics of step N-1 are fetched after step N was sent to the devices,
which therefore never wait for the host. Evaluators are functions of a ``Snapshot``, handed in from
the layers above.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.checkpointing.save_schedule import SaveSchedule
from flax_transformers.checkpointing.step_directories import write_files
from flax_transformers.config_json import to_json
from flax_transformers.data.dataset import Dataset
from flax_transformers.errors import UserError
from flax_transformers.monitoring.example_log import ExampleLog
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Totals, read_metrics
from flax_transformers.monitoring.profiling import Profiling, Watch
from flax_transformers.monitoring.progress import Progress
from flax_transformers.monitoring.sinks import JsonLines, MetricSink, TensorBoard
from flax_transformers.monitoring.throughput import REMEDY, Meter
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.optim.spike_detection import TooManySkipped
from flax_transformers.parallel.distributed import check_equal, compiled_together
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.parallel.rules import check_batch
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.storage.workdir import (
    clear_side_files,
    exclusive_lock,
    open_workdir,
    set_aside,
    write_side_file,
    writing,
)
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.callbacks import Callback, Listeners, SinkCallback
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.divergence import (
    is_not_finite,
    is_unproven,
    require_finite_end,
)
from flax_transformers.training.mixture_progress import MixtureProgress
from flax_transformers.training.run_state import (
    RunState,
    check_meta,
    checkpoint_meta,
    tokenizer_files,
)
from flax_transformers.training.setup import check_phase, make_meter, make_trainer
from flax_transformers.training.state import TrainState
from flax_transformers.training.stop import StopRequest
from flax_transformers.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What an evaluator may look at: the run as it stands after ``step`` steps."""

    step: int
    params: Any
    """Their average where one is kept (``config.ema``)."""
    phase: AnyPhase
    mesh: Mesh
    functions: ModelFunctions
    evaluation_step: Callable[..., Any]
    """Compiled ``(params, batch) -> {name: (sum, count)}`` for batches on the mesh."""


Evaluator = Callable[[Snapshot], dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended. ``preempted``: stopped on request before the last step."""

    step: int
    preempted: bool
    metrics: dict[str, float]
    """The last value of every metric."""


@dataclass(frozen=True)
class Run:
    """All that stays the same from the first step to the last."""

    config: TrainConfig
    prepared: Dataset
    workdir: epath.Path
    mesh: Mesh
    trainer: Trainer
    checkpoints: Checkpoints
    evaluators: Sequence[Evaluator]
    profiling: Profiling
    listeners: Listeners
    clock: Clock
    tokenizer_files: dict[str, bytes]
    latest: dict[str, float]
    """The last value of every metric."""

    @property
    def is_writer(self) -> bool:
        return jax.process_index() == 0


def train(
    config: TrainConfig,
    prepared: Dataset,
    workdir: str | epath.Path,
    evaluators: Sequence[Evaluator] = (),
    initial: Callable[[Mesh], Any] | None = None,
    profiling: Profiling | None = None,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[MetricSink] = (),
) -> Outcome:
    """Trains to the end of the last phase, from the newest checkpoint in ``workdir`` if any.

    ``initial`` gives the parameters, on the mesh, that a run without a checkpoint starts from;
    without it they are drawn. ``sinks`` get the metrics too, and are closed at the end.

    Raises UserError for mistakes that the user can fix, before anything in ``workdir`` is
    overwritten.
    """
    clock = Clock()
    mesh = checked_mesh(config)
    workdir = open_workdir(workdir)
    with (
        watchdog.running(config.limits, config.logging.hang_dump_s),
        watchdog.phase("prepare"),
        jax.set_mesh(mesh),
        exclusive_lock(workdir),
    ):
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
            checkpoints=Checkpoints(workdir / "checkpoints", config.checkpoints),
            evaluators=evaluators,
            profiling=profiling or Profiling(),
            listeners=Listeners([*callbacks, *map(SinkCallback, sinks)]),
            clock=clock,
            tokenizer_files=tokenizer_files(config, prepared),
            latest={},
        )
        with watchdog.phase("restore"):
            begun = start(run, initial)
        try:
            ended = _run_to_end(run, begun)
        finally:
            with watchdog.phase("save"):
                run.checkpoints.close()
        outcome = Outcome(ended.step, ended.step < config.total_steps, dict(run.latest))
        if not outcome.preempted:
            require_finite_end(workdir, ended.step, outcome.metrics, ended.diverging_steps)
    return outcome


def _run_to_end(run: Run, begun: Begun) -> Ended:
    """Trains to the end or to a requested stop, and rolls back where steps diverge."""
    total = run.config.total_steps
    with (
        StopRequest() as stop,
        watchdog.phase("step"),
        run.listeners.training(begun.position.step, total),
    ):
        ended = _run_phases(run, begun, stop)
        while ended.diverged:
            with watchdog.phase("restore"):
                begun = _roll_back(run, ended)
            ended = _run_phases(run, begun, stop)
    return ended


def checked_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run. Raises UserError if it does not fit the devices, or a batch the mesh."""
    mesh = make_mesh(config.mesh)
    for phase in config.phases:
        check_phase(phase, mesh)
    check_batch(config.evaluation.batch_size, 1, mesh, name="evaluation.batch_size")
    return mesh


@dataclass(frozen=True)
class Begun:
    """Where a run starts or resumes."""

    state: TrainState
    position: RunState
    totals: Totals
    """Sums and counts of the steps that no row of metrics holds yet."""
    diverging_steps: int = 0
    """Steps in a row, up to this position, that were skipped for values that are not finite."""


@dataclass(frozen=True)
class Ended:
    """Where a run stopped, and what it has to know to roll back."""

    position: RunState
    diverged: bool
    """Whether more steps in a row were skipped than may be, so that it has to roll back."""
    diverging_steps: int
    """Steps in a row, up to the last one, that were skipped for values that are not finite."""
    consumed: dict[int, int]
    """Examples consumed by phase, of the phases that were trained in."""

    @property
    def step(self) -> int:
        return self.position.step


def start(run: Run, initial: Callable[[Mesh], Any] | None) -> Begun:
    """The newest checkpoint's state, or a fresh one; says in the workdir what is trained."""
    begun = _restore(run, is_not_finite)
    if begun is None:
        state = run.trainer.init(run.config.seed)
        if initial is not None:
            state = state.starting_from(initial(run.mesh))
        begun = Begun(state, RunState(), {})
    elif begun.position.step < run.config.total_steps:
        log.info("resuming from step %d", begun.position.step)
    else:
        log.info(
            "already trained to step %d; raise phases.*.steps to train further", begun.position.step
        )
    if run.is_writer:
        run.clock.go_on(read_metrics(run.workdir), begun.position.step)
        write_side_file(run.workdir / "config.json", json.dumps(to_json(run.config), indent=1))
        _write_tokenizers(run)
    return begun


def _write_tokenizers(run: Run) -> None:
    """For people and other programs: checkpoints have their own copies."""
    try:
        write_files(run.workdir, run.tokenizer_files)
    except OSError as error:
        for name in {name.partition("/")[0] for name in run.tokenizer_files}:
            set_aside(run.workdir / name, f"cannot be written ({error.strerror or error})")
        with writing(run.workdir / "tokenizer"):
            write_files(run.workdir, run.tokenizer_files)


def _restore(run: Run, refuse: Callable[[TrainState, dict[str, Any]], str | None]) -> Begun | None:
    """From the newest checkpoint that is not refused."""
    restored = run.checkpoints.restore_newest(
        run.trainer.abstract,
        check=lambda meta: check_meta(meta, run.config, run.prepared, run.workdir),
        refuse=refuse,
    )
    if restored is None:
        return None
    meta = restored.meta
    run.latest.update(meta["metrics"])
    return Begun(
        restored.state.completed(run.trainer.abstract),
        RunState.saved_in(meta),
        meta.get("totals", {}),
        meta.get("diverging_steps", 0),
    )


def _roll_back(run: Run, ended: Ended) -> Begun:
    """The newest checkpoint from before the streak of skipped steps that ``ended`` the run, and the
    data behind it. Raises UserError if there is no checkpoint."""
    begun = _restore(run, is_unproven)
    if begun is None:
        raise UserError(
            "too many steps in a row were skipped before there was a checkpoint to go back to; "
            f"{REMEDY}, or save earlier, with checkpoints.every_steps"
        )
    position = begun.position.normalized(run.config)
    # Where the streak spans two phases, the first one continues behind what it had consumed.
    examples = max(position.examples, ended.consumed.get(position.phase, 0))
    log.warning(
        "went back to step %d; the %d examples since are left out",
        position.step,
        examples - position.examples,
    )
    if run.is_writer:
        run.clock.go_on(read_metrics(run.workdir), position.step)
    position = replace(position, examples=examples, rollbacks=ended.position.rollbacks + 1)
    return replace(begun, position=position)


def _run_phases(run: Run, begun: Begun, stop: StopRequest) -> Ended:
    """Trains to the end, to a requested stop, or to where the run has to roll back."""
    config, state, position, totals = run.config, begun.state, begun.position, begun.totals
    diverging_steps, saves = begun.diverging_steps, SaveSchedule(config.checkpoints.every_steps)
    consumed: dict[int, int] = {}
    with run.listeners.writing(_sinks(run, position.step)):
        while position.step < config.total_steps and not stop.obeyed:
            position = position.normalized(config)
            try:
                state, diverging_steps = _run_phase(run, state, position, totals, saves, stop)
            except TooManySkipped:
                if position.rollbacks >= config.max_rollbacks:
                    raise
                return Ended(position, True, 0, consumed | {position.phase: position.examples})
            consumed[position.phase], totals = position.examples, {}
    return Ended(position, False, diverging_steps, consumed)


def _sinks(run: Run, step: int) -> list[MetricSink]:
    """Those that the config asks for, for rows after ``step``; on process 0 alone."""
    if not run.is_writer:
        return []
    logging = run.config.logging
    sinks: list[MetricSink] = [JsonLines(run.workdir, step)]
    if logging.tensorboard:
        sinks.append(TensorBoard(run.workdir, step))
    sinks += [sink.open(run.workdir, step) for sink in logging.sinks]
    return [*sinks, Progress(run.config.total_steps, step, metrics=run.latest)]


def _run_phase(
    run: Run,
    state: TrainState,
    position: RunState,
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
    meter = make_meter(config, phase, run.mesh, run.clock, totals)
    mixture = MixtureProgress(config, run.prepared, position.phase)
    with (
        batches_on_mesh(config, run.prepared, run.mesh, position) as batches,
        ExampleLog(run.workdir, position.step) as example_log,
        Watch(run.profiling, run.workdir, position.phase) as watch,
    ):
        stopping = False
        while not position.done(config) and not stopping:
            with meter.waiting():
                batch, ids = next(batches)
            watch.before(position.step + 1, train_step, state, batch)
            with jax.transfer_guard("disallow"):
                state, report = take_step(state, batch)
                position.examples += phase.batch_size
                meter.fetch_previous()
            meter.sent(report)
            position.step += 1
            if config.logging.ledger:
                example_log.write(position.step, ids)
            listeners.step(position.step, state)
            last = position.done(config)
            if last or position.step % config.logging.every_steps == 0:
                row = meter.row(position.step) | mixture.row(position.examples)
                run.latest.update(row)
                listeners.metrics(position.step, row)
            if last or _due(position.step, config.evaluation.every_steps):
                with meter.paused("evaluation"), watchdog.phase("evaluation"):
                    row = _evaluate(run, state, position, phase, evaluation_step)
                    run.latest.update(row)
                    listeners.evaluation(position.step, row)
            stopping = stop.check(run.checkpoints, position.step)
            if saves.is_due(position.step, end_of_phase=last) or stopping:
                with meter.paused("checkpoint"), watchdog.phase("save"):
                    listeners.flush()  # metrics of the steps that the checkpoint holds
                    example_log.flush()
                    if _save(run, state, position, meter, stopping):
                        saves.saved()
    return state, meter.diverging_steps


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(
    run: Run, state: TrainState, position: RunState, phase: AnyPhase, step: Callable[..., Any]
) -> dict[str, float]:
    snapshot = Snapshot(
        position.step, state.best_params, phase, run.mesh, run.trainer.functions, step
    )
    row: dict[str, float] = {}
    for evaluator in run.evaluators:
        watchdog.progress()
        row |= evaluator(snapshot)
    return row


def _save(run: Run, state: TrainState, position: RunState, meter: Meter, stopping: bool) -> bool:
    """Saves, but while steps are being skipped only where the run stops or ends. Whether it saved.

    A streak of skipped steps leaves the state as it was before: there is nothing to save but the
    position in the data, and it may be the start of a divergence. What is saved all the same says
    so (``consecutive_skips``).
    """
    skips, ends = meter.consecutive_skips, position.step == run.config.total_steps
    if skips and not (ends or stopping):
        log.warning("step %d is not saved: the last %d step(s) were skipped", position.step, skips)
        return False
    meta = checkpoint_meta(
        run.config,
        run.prepared,
        position,
        run.latest,
        meter.totals,
        consecutive_skips=skips,
        diverging_steps=meter.diverging_steps,
    )
    run.checkpoints.save(position.step, state, meta, files=run.tokenizer_files)
    run.listeners.checkpoint(position.step, run.checkpoints.directory / str(position.step))
    return True
