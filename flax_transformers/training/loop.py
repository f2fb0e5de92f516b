"""The training loop: one for all objectives, models and meshes.

It reads, in order: where to start (``start``), one phase after another (``_run_phase``), and in a
phase step after step. Metrics of step N-1 are fetched after step N is on its way, so the device
never waits for the host. What looks at the run from above (held-out scores, samples) is handed in
as functions of a ``Snapshot``.
"""

from __future__ import annotations

import json
import logging
import math
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
from flax_transformers.monitoring.metrics import MetricsWriter, Totals, read_metrics
from flax_transformers.monitoring.profiling import Profiling, Watch
from flax_transformers.monitoring.progress import Progress
from flax_transformers.monitoring.throughput import REMEDY, Meter
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.optim.finite import is_finite
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
    write_text,
    writing,
)
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.mixture_progress import MixtureProgress
from flax_transformers.training.run_state import (
    RunState,
    check_meta,
    checkpoint_meta,
    tokenizer_files,
)
from flax_transformers.training.setup import Program, build_program, check_phase, make_meter
from flax_transformers.training.state import TrainState
from flax_transformers.training.stop import StopRequest

log = logging.getLogger(__name__)

_ELSEWHERE = "train in another --workdir"


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
    program: Program
    checkpoints: Checkpoints
    evaluators: Sequence[Evaluator]
    probes: Profiling
    clock: Clock
    tokenizer_files: dict[str, bytes]
    latest: dict[str, float]

    @property
    def is_writer(self) -> bool:
        return jax.process_index() == 0


def train(
    config: TrainConfig,
    prepared: Dataset,
    workdir: str | epath.Path,
    evaluators: Sequence[Evaluator] = (),
    initial: Callable[[Mesh], Any] | None = None,
    probes: Profiling | None = None,
) -> Outcome:
    """Trains to the end of the last phase, from the newest checkpoint in ``workdir`` if any.

    ``initial`` gives the parameters, on the mesh, that a run without a checkpoint starts from;
    without it they are drawn. ``probes`` look into the run and do not change it.

    Raises UserError for what the user can mend, before anything in ``workdir`` is overwritten.
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
            program=build_program(config, mesh),
            checkpoints=Checkpoints(workdir / "checkpoints", config.checkpoints),
            evaluators=evaluators,
            probes=probes or Profiling(),
            clock=clock,
            tokenizer_files=tokenizer_files(config, prepared),
            latest={},
        )
        with watchdog.phase("restore"):
            begun = start(run, initial)
        try:
            with StopRequest() as stop, watchdog.phase("step"):
                ended = _run_phases(run, begun, stop)
                while ended.diverged:
                    with watchdog.phase("restore"):
                        begun = _roll_back(run, ended)
                    ended = _run_phases(run, begun, stop)
        finally:
            with watchdog.phase("save"):
                run.checkpoints.close()
        outcome = Outcome(ended.step, ended.step < config.total_steps, dict(run.latest))
        _require_finite_end(run, outcome, ended)
    return outcome


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
        state = run.program.initial_state()
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
        write_text(run.workdir / "config.json", json.dumps(to_json(run.config), indent=1))
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
        run.program.abstract,
        check=lambda meta: check_meta(meta, run.config, run.prepared, run.workdir),
        refuse=refuse,
    )
    if restored is None:
        return None
    meta = restored.meta
    run.latest.update(meta["metrics"])
    return Begun(
        restored.state,
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
    writer = MetricsWriter(
        run.workdir,
        run.is_writer,
        start_step=position.step,
        tensorboard=config.logging.tensorboard,
    )
    progress = Progress(config.total_steps, position.step, enabled=run.is_writer)
    diverging_steps, saves = begun.diverging_steps, SaveSchedule(config.checkpoints.every_steps)
    consumed: dict[int, int] = {}
    with writer, progress:
        while position.step < config.total_steps and not stop.obeyed:
            position = position.normalized(config)
            outputs = Outputs(writer, progress, totals, saves)
            try:
                state, diverging_steps = _run_phase(run, state, position, outputs, stop)
            except TooManySkipped:
                if position.rollbacks >= config.max_rollbacks:
                    raise
                return Ended(position, True, 0, consumed | {position.phase: position.examples})
            consumed[position.phase], totals = position.examples, {}
    return Ended(position, False, diverging_steps, consumed)


@dataclass(frozen=True)
class Outputs:
    """Where metrics go, those that come first, and when a checkpoint is due."""

    writer: MetricsWriter
    progress: Progress
    totals: Totals
    saves: SaveSchedule


def _run_phase(
    run: Run, state: TrainState, position: RunState, outputs: Outputs, stop: StopRequest
) -> tuple[TrainState, int]:
    """Trains to the end of the phase at ``position``, which moves along, or to a requested stop.

    Returns the state, and how many steps in a row, up to the last one, were skipped for values that
    are not finite.
    """
    config, phase = run.config, run.config.phases[position.phase]
    writer, progress = outputs.writer, outputs.progress
    train_step = run.program.train_step(phase)
    take_step = compiled_together(train_step)
    evaluation_step = compiled_together(run.program.evaluation_step())
    abstract = run.program.abstract.params
    meter = make_meter(config, phase, abstract, run.mesh, run.clock, outputs.totals)
    parts = MixtureProgress(config, run.prepared, position.phase)

    def record(row: dict[str, float]) -> None:
        run.latest.update(row)
        writer.write(position.step, row)
        progress.update(position.step, run.latest)

    with (
        batches_on_mesh(config, run.prepared, run.mesh, position) as batches,
        ExampleLog(run.workdir, position.step) as ledger,
        Watch(run.probes, run.workdir, position.phase) as watch,
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
                ledger.write(position.step, ids)
            progress.update(position.step, run.latest)
            last = position.done(config)
            if last or position.step % config.logging.every_steps == 0:
                record(meter.row(position.step) | parts.row(position.examples))
            if last or _due(position.step, config.evaluation.every_steps):
                with meter.paused("evaluation"), watchdog.phase("evaluation"):
                    record(_evaluate(run, state, position, phase, evaluation_step))
            stopping = stop.check(run.checkpoints, position.step)
            if outputs.saves.is_due(position.step, end_of_phase=last) or stopping:
                with meter.paused("checkpoint"), watchdog.phase("save"):
                    writer.flush()  # what the checkpoint has seen outlives this process with it
                    ledger.flush()
                    if _save(run, state, position, meter, stopping):
                        outputs.saves.saved()
    return state, meter.diverging_steps


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(
    run: Run, state: TrainState, position: RunState, phase: AnyPhase, step: Callable[..., Any]
) -> dict[str, float]:
    snapshot = Snapshot(
        position.step, state.best_params, phase, run.mesh, run.program.functions, step
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
    return True


def is_not_finite(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Why a run cannot resume from a checkpoint, if so."""
    if meta.get("consecutive_skips") == 0:  # tested by the step before it was saved
        return None
    finite = jax.jit(is_finite)(state.params, state.opt_state, state.ema)
    return None if finite else "holds values that are not finite"


def is_unproven(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Why a run cannot roll back to a checkpoint, if so."""
    if int(state.skipped_in_a_row):
        return "was saved while steps were being skipped"
    return is_not_finite(state, meta)


def _require_finite_end(run: Run, outcome: Outcome, ended: Ended) -> None:
    """Raises UserError if a run is through without a finite loss at its end.

    That is: no step had a finite loss, more than the last step was skipped for values that are not
    finite, or a loss in the last metrics is not finite. Where the last step alone was skipped, the
    parameters are those of the step before, whose loss is finite: a warning says so. What the run
    ended with is saved in every case, so that running it again ends the same way.
    """
    if outcome.preempted:
        return
    where, skips = f"the run in {run.workdir} ended at step {ended.step}", ended.diverging_steps
    if skips and "train/loss" not in outcome.metrics:
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
    wrong = [name for name in losses if not math.isfinite(outcome.metrics.get(name, 0.0))]
    if wrong:
        raise UserError(
            f"{where} with {' and '.join(wrong)} not finite: do not use its last checkpoint; "
            f"{REMEDY}, and {_ELSEWHERE}"
        )
    if skips:
        log.warning(
            "the last step, %d, was skipped, as its values are not finite; the last checkpoint "
            "holds the parameters from before it",
            ended.step,
        )
