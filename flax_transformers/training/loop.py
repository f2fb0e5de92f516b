"""The training loop: one for all objectives, models and meshes.

It reads, in order: where to start (``start``), one phase after another (``_run_phase``), and in a
phase step after step. Metrics of step N-1 are fetched after step N is on its way, so the device
never waits for the host. What looks at the run from above (held-out scores, samples) is handed in
as functions of a ``Snapshot``.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flax_transformers.data.dataset import Dataset, training_examples
from flax_transformers.data.pipeline import TrainStream
from flax_transformers.data.tokenizers import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import ModelFunctions
from flax_transformers.parallel.distributed import check_equal
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.parallel.rules import batch_sharding, check_batch, host_rows, place_rows
from flax_transformers.training.checkpoints import Checkpoints
from flax_transformers.training.config import (
    AnyPhase,
    TrainConfig,
    check_resumable,
    from_json,
    to_json,
)
from flax_transformers.training.ledger import Ledger
from flax_transformers.training.meter import Meter
from flax_transformers.training.metrics import MetricsWriter
from flax_transformers.training.program import Program, build_program, check_phase
from flax_transformers.training.progress import Progress
from flax_transformers.training.state import TrainState
from flax_transformers.training.stop import StopRequest
from flax_transformers.training.taken import PartsTaken
from flax_transformers.training.workdir import only_one, open_workdir, write_text

log = logging.getLogger(__name__)

_TOKENIZERS = ("tokenizer", "target_tokenizer")


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
    latest: dict[str, float]

    @property
    def is_writer(self) -> bool:
        return jax.process_index() == 0


@dataclass
class Position:
    """Where a run stands: steps taken, the phase, and examples of the phase consumed."""

    step: int = 0
    phase: int = 0
    examples: int = 0

    def done(self, config: TrainConfig) -> bool:
        """Whether the phase is over."""
        return self.step >= sum(phase.steps for phase in config.phases[: self.phase + 1])

    def normalized(self, config: TrainConfig) -> Position:
        """The same place, said as the start of the next phase where this one is over."""
        return Position(self.step, self.phase + 1, 0) if self.done(config) else self


def train(
    config: TrainConfig,
    prepared: Dataset,
    workdir: str | epath.Path,
    evaluators: Sequence[Evaluator] = (),
    initial: Callable[[Mesh], Any] | None = None,
) -> Outcome:
    """Trains to the end of the last phase, from the newest checkpoint in ``workdir`` if any.

    ``initial`` gives the parameters, on the mesh, that a run without a checkpoint starts from;
    without it they are drawn.

    Raises UserError for what the user can mend, before anything in ``workdir`` is overwritten.
    """
    mesh = checked_mesh(config)
    workdir = open_workdir(workdir)
    with jax.set_mesh(mesh), only_one(workdir):
        run, state, position = start(config, prepared, workdir, mesh, evaluators, initial)
        writer = MetricsWriter(run.workdir, run.is_writer, start_step=position.step)
        total = config.total_steps
        progress = Progress(total, position.step, enabled=run.is_writer)
        try:
            with writer, progress, StopRequest() as stop:
                while position.step < total and not stop.obeyed:
                    position = position.normalized(config)
                    state, position = _run_phase(run, state, position, writer, progress, stop)
        finally:
            run.checkpoints.close()
    return Outcome(position.step, position.step < total, dict(run.latest))


def checked_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run. Raises UserError if it does not fit the devices, or a batch the mesh."""
    mesh = make_mesh(config.mesh)
    for phase in config.phases:
        check_phase(phase, mesh)
    check_batch(config.evaluation.batch_size, 1, mesh, name="evaluation.batch_size")
    return mesh


def start(
    config: TrainConfig,
    prepared: Dataset,
    workdir: epath.Path,
    mesh: Mesh,
    evaluators: Sequence[Evaluator],
    initial: Callable[[Mesh], Any] | None,
) -> tuple[Run, TrainState, Position]:
    """Builds everything, and the state: the newest checkpoint's, or a fresh one."""
    check_equal(
        "the prepared data",
        prepared.fingerprint,
        "prepare it once, into a --data.store that all machines share",
    )
    program = build_program(config, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoints)
    run = Run(
        config=config,
        prepared=prepared,
        workdir=workdir,
        mesh=mesh,
        program=program,
        checkpoints=checkpoints,
        evaluators=evaluators,
        latest={},
    )
    restored = checkpoints.restore_newest(
        program.abstract, check=lambda meta: _check_meta(run, meta)
    )
    if restored is None:
        state = program.initial_state()
        if initial is not None:
            state = state.starting_from(initial(mesh))
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
        write_text(workdir / "config.json", json.dumps(to_json(config), indent=1))
        for name, tokenizer in _tokenizers(prepared).items():
            tokenizer.save(workdir / name)
    return run, state, position


def _check_meta(run: Run, meta: dict[str, Any]) -> None:
    """Refuses a checkpoint of another run; says what changed in one that goes on."""
    where = f"the checkpoint in {run.workdir}"
    for change in check_resumable(meta["config"], run.config, where):
        log.info("changed since the checkpoint: %s", change)
    trained_with = {name: meta[name] for name in _TOKENIZERS if meta.get(name) is not None}
    if trained_with != _fingerprints(run.prepared):
        raise UserError(
            f"{where} was trained with another tokenizer than that of the token store "
            f"{run.prepared.directory}; set --data.store to the store it was trained on"
        )
    if meta["store"] != run.prepared.fingerprint:
        raise UserError(
            f"{where} was trained on other data than the store "
            f"{run.prepared.directory} holds, which would shift its place in the data; set "
            "--data.store to the store it was trained on, or choose another --workdir"
        )
    position, phases = Position(**meta["position"]), run.config.phases
    if position.normalized(run.config).phase >= len(phases) and position.step < sum(
        phase.steps for phase in phases
    ):
        raise UserError(
            f"{where} stands in phase {position.phase}, but the config has {len(phases)} phase(s); "
            "keep the phases that are done, and add to the last one"
        )
    saved = from_json(meta["config"]["phases"][position.phase]).sequence_length
    if not position.done(run.config) and phases[position.phase].sequence_length != saved:
        raise UserError(
            f"{where} is in the middle of a phase with sequence_length {saved}, the config has "
            f"{phases[position.phase].sequence_length}; finish the phase, or choose another "
            "--workdir"
        )


def _run_phase(
    run: Run,
    state: TrainState,
    position: Position,
    writer: MetricsWriter,
    progress: Progress,
    stop: StopRequest,
) -> tuple[TrainState, Position]:
    """Trains to the end of the phase at ``position``, or to a requested stop."""
    config, phase = run.config, run.config.phases[position.phase]
    train_step = run.program.train_step(phase)
    evaluation_step = run.program.evaluation_step()
    meter = Meter(config, phase, run.program.abstract.params, run.mesh)
    parts = PartsTaken(config, run.prepared, position.phase)

    def record(row: dict[str, float]) -> None:
        run.latest.update(row)
        writer.write(position.step, row)
        progress.update(position.step, run.latest)

    with _batches(run, phase, position) as batches, Ledger(run.workdir, position.step) as ledger:
        stopping = False
        while not position.done(config) and not stopping:
            batch, ids = next(batches)
            with jax.transfer_guard("disallow"):
                state, report = train_step(state, batch)
                meter.fetch_previous()
            meter.sent(report)
            position.step += 1
            position.examples += phase.batch_size
            if config.logging.ledger:
                ledger.write(position.step, ids)
            progress.update(position.step, run.latest)
            last = position.done(config)
            if last or position.step % config.logging.every_steps == 0:
                record(meter.row(position.step) | parts.row(position.examples))
            if last or _due(position.step, config.evaluation.every_steps):
                with meter.paused():
                    record(_evaluate(run, state, position, phase, evaluation_step))
            stopping = stop.check(run.checkpoints, position.step)
            if last or stopping or _due(position.step, config.checkpoints.every_steps):
                with meter.paused():
                    writer.flush()  # what the checkpoint has seen outlives this process with it
                    ledger.flush()
                    _save(run, state, position)
    return state, position


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
    meta = {
        "config": to_json(run.config),
        "tokenizer": None,
        **_fingerprints(run.prepared),
        "store": run.prepared.fingerprint,
        "position": asdict(position),
        "metrics": run.latest,
    }
    files = {name: run.workdir / name for name in _tokenizers(run.prepared)}
    run.checkpoints.save(position.step, state, meta, files=files)


def _tokenizers(prepared: Dataset) -> dict[str, Tokenizer]:
    """Those that there are, by name: of a folder in a checkpoint, and of an entry in its meta."""
    both = zip(_TOKENIZERS, (prepared.tokenizer, prepared.target_tokenizer), strict=True)
    return {name: tokenizer for name, tokenizer in both if tokenizer is not None}


def _fingerprints(prepared: Dataset) -> dict[str, str]:
    return {name: tokenizer.fingerprint for name, tokenizer in _tokenizers(prepared).items()}


@contextlib.contextmanager
def _batches(
    run: Run, phase: AnyPhase, position: Position
) -> Iterator[Iterator[tuple[dict[str, jax.Array], np.ndarray]]]:
    """Batches on the mesh from ``position`` on, each with the ids of this process's examples.

    One batch is prepared and sent while the step before it runs.
    """
    config, sharding = run.config, batch_sharding(run.mesh)
    rows = host_rows(sharding, phase.batch_size)
    spec = config.objective.window_spec(phase.sequence_length)
    stream = TrainStream(
        training_examples(run.prepared, spec),
        config.objective,
        run.prepared.vocabulary,
        sequence_length=phase.sequence_length,
        batch_size=phase.batch_size,
        rows=rows,
        seed=(config.seed, position.phase),
        workers=config.data.workers,
        position=position.examples,
        static_epochs=spec.static_epochs,
    )

    def placed() -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
        ahead = None
        for local in stream:
            ids = local.pop("example_id")
            batch = place_rows(local, rows, sharding, phase.batch_size), ids
            if ahead is not None:
                yield ahead
            ahead = batch

    try:
        yield placed()
    finally:
        stream.close()
