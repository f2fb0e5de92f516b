"""The training loop: one for all objectives, models and meshes.

It reads, in order: where to start (``start``), one phase after another (``_run_phase``), and in a
phase step after step. Metrics of step N-1 are fetched after step N is on its way, so the device
never waits for the host. What looks at the run from above (held-out scores, samples) is handed in
as functions of a ``Snapshot``.
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

from flax_transformers.data.dataset import Dataset
from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import ModelFunctions
from flax_transformers.objectives.rows import run_frame
from flax_transformers.parallel.distributed import check_equal, compiled_together
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.parallel.rules import check_batch
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.checkpoints import Checkpoints
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.config_json import to_json
from flax_transformers.training.goodput import Clock
from flax_transformers.training.ledger import Ledger
from flax_transformers.training.meter import Meter
from flax_transformers.training.metrics import MetricsWriter, read_metrics
from flax_transformers.training.position import (
    Position,
    check_meta,
    checkpoint_meta,
    tokenizers,
)
from flax_transformers.training.probes import Probes, Watch
from flax_transformers.training.program import Program, build_program, check_phase
from flax_transformers.training.progress import Progress
from flax_transformers.training.spikes import TooManySkipped
from flax_transformers.training.state import TrainState
from flax_transformers.training.stop import StopRequest
from flax_transformers.training.taken import PartsTaken
from flax_transformers.training.workdir import only_one, open_workdir, write_text

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
    program: Program
    checkpoints: Checkpoints
    evaluators: Sequence[Evaluator]
    probes: Probes
    clock: Clock
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
    probes: Probes | None = None,
) -> Outcome:
    """Trains to the end of the last phase, from the newest checkpoint in ``workdir`` if any.

    ``initial`` gives the parameters, on the mesh, that a run without a checkpoint starts from;
    without it they are drawn. ``probes`` look into the run and do not change it.

    Raises UserError for what the user can mend, before anything in ``workdir`` is overwritten.
    """
    clock = Clock()
    mesh = checked_mesh(config)
    workdir = open_workdir(workdir)
    with jax.set_mesh(mesh), only_one(workdir):
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
            probes=probes or Probes(),
            clock=clock,
            latest={},
        )
        state, position = start(run, initial)
        try:
            with StopRequest() as stop:
                spoilt, position = _run_phases(run, state, position, stop)
                while spoilt:
                    state, position = _go_back(run, initial, position)
                    spoilt, position = _run_phases(run, state, position, stop)
        finally:
            run.checkpoints.close()
    return Outcome(position.step, position.step < config.total_steps, dict(run.latest))


def checked_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run. Raises UserError if it does not fit the devices, or a batch the mesh."""
    mesh = make_mesh(config.mesh)
    for phase in config.phases:
        check_phase(phase, mesh)
    check_batch(config.evaluation.batch_size, 1, mesh, name="evaluation.batch_size")
    return mesh


def start(run: Run, initial: Callable[[Mesh], Any] | None) -> tuple[TrainState, Position]:
    """The newest checkpoint's state, or a fresh one; says in the workdir what is trained."""
    config, prepared, workdir = run.config, run.prepared, run.workdir
    restored = run.checkpoints.restore_newest(
        run.program.abstract, check=lambda meta: check_meta(meta, config, prepared, workdir)
    )
    if restored is None:
        state = run.program.initial_state()
        if initial is not None:
            state = state.starting_from(initial(run.mesh))
        position = Position()
    else:
        state = restored.state
        position = Position(**restored.meta["position"])
        run.latest.update(restored.meta["metrics"])
        if position.step < config.total_steps:
            log.info("going on from step %d", position.step)
        else:
            log.info("already trained to step %d; more phases.*.steps go on", position.step)
    if run.is_writer:
        run.clock.go_on(read_metrics(workdir), position.step)
        write_text(workdir / "config.json", json.dumps(to_json(config), indent=1))
        frame = run_frame(config.objective, prepared.vocabulary)
        for name, tokenizer in tokenizers(prepared).items():
            tokenizer.save(workdir / name, frame if name == "tokenizer" else None)
    return state, position


def _go_back(
    run: Run, initial: Callable[[Mesh], Any] | None, spoilt: Position
) -> tuple[TrainState, Position]:
    """The newest checkpoint's state, and the data behind ``spoilt``, where too many steps in a row
    were skipped. Raises UserError if there is no checkpoint."""
    state, position = start(run, initial)
    if position.step == 0:
        raise UserError(
            "too many steps in a row were skipped before there was a checkpoint to go back to; "
            "lower optimizer.learning_rate, lengthen the warm-up, or save earlier, with "
            "checkpoints.every_steps"
        )
    position = position.normalized(run.config)
    log.warning(
        "went back to step %d; the %d examples since are left out",
        position.step,
        spoilt.examples - position.examples,
    )
    position = replace(position, examples=spoilt.examples, rewinds=spoilt.rewinds + 1)
    return state.replace(skipped_in_a_row=0 * state.skipped_in_a_row), position


def _run_phases(
    run: Run, state: TrainState, position: Position, stop: StopRequest
) -> tuple[bool, Position]:
    """Trains to the end, to a requested stop (False), or to where the run has to go back (True)."""
    config = run.config
    writer = MetricsWriter(
        run.workdir,
        run.is_writer,
        start_step=position.step,
        tensorboard=config.logging.tensorboard,
    )
    progress = Progress(config.total_steps, position.step, enabled=run.is_writer)
    with writer, progress:
        while position.step < config.total_steps and not stop.obeyed:
            position = position.normalized(config)
            try:
                state = _run_phase(run, state, position, writer, progress, stop)
            except TooManySkipped:
                if position.rewinds >= config.max_rewinds:
                    raise
                return True, position
    return False, position


def _run_phase(
    run: Run,
    state: TrainState,
    position: Position,
    writer: MetricsWriter,
    progress: Progress,
    stop: StopRequest,
) -> TrainState:
    """Trains to the end of the phase at ``position``, which moves along, or to a requested stop."""
    config, phase = run.config, run.config.phases[position.phase]
    train_step = run.program.train_step(phase)
    take_step = compiled_together(train_step)
    evaluation_step = compiled_together(run.program.evaluation_step())
    meter = Meter(config, phase, run.program.abstract.params, run.mesh, run.clock)
    parts = PartsTaken(config, run.prepared, position.phase)

    def record(row: dict[str, float]) -> None:
        run.latest.update(row)
        writer.write(position.step, row)
        progress.update(position.step, run.latest)

    with (
        batches_on_mesh(config, run.prepared, run.mesh, position) as batches,
        Ledger(run.workdir, position.step) as ledger,
        Watch(run.probes, run.workdir, position.phase, config.logging.hang_dump_s) as watch,
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
                with meter.paused("evaluation"), watch.patient():
                    record(_evaluate(run, state, position, phase, evaluation_step))
            stopping = stop.check(run.checkpoints, position.step)
            if last or stopping or _due(position.step, config.checkpoints.every_steps):
                with meter.paused("checkpoint"), watch.patient():
                    writer.flush()  # what the checkpoint has seen outlives this process with it
                    ledger.flush()
                    _save(run, state, position)
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(
    run: Run, state: TrainState, position: Position, phase: AnyPhase, step: Callable[..., Any]
) -> dict[str, float]:
    snapshot = Snapshot(
        position.step, state.best_params, phase, run.mesh, run.program.functions, step
    )
    row: dict[str, float] = {}
    for evaluator in run.evaluators:
        row |= evaluator(snapshot)
    return row


def _save(run: Run, state: TrainState, position: Position) -> None:
    meta = checkpoint_meta(run.config, run.prepared, position, run.latest)
    files = {name: run.workdir / name for name in tokenizers(run.prepared)}
    run.checkpoints.save(position.step, state, meta, files=files)
