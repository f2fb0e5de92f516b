"""Several runs that differ in their seeds alone, trained by one program.

Their states are stacked, and a step is `jax.vmap` of that of one run: for models so small that one
of them does not fill the devices. Every run keeps what it has when it is trained alone: a workdir,
checkpoints, metrics, and data in an order of its own. Its numbers differ by rounding.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from flax_transformers.checkpointing.save_schedule import SaveSchedule
from flax_transformers.checkpointing.step_directories import finished_steps
from flax_transformers.config_json import to_json
from flax_transformers.errors import UserError, WorkdirInUse
from flax_transformers.monitoring.example_log import ExampleLog
from flax_transformers.monitoring.metrics import Totals, read_metrics
from flax_transformers.monitoring.mixture_progress import MixtureProgress
from flax_transformers.monitoring.progress import Progress
from flax_transformers.monitoring.throughput import StepMetrics
from flax_transformers.optim.spike_detection import TooManySkipped
from flax_transformers.parallel.distributed import compiled_together
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.post_training.reinforcement.policy import PolicyObjective
from flax_transformers.run import ReadyRun
from flax_transformers.training import loop
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.resume import Run, StartPoint, StopPoint, start_or_resume
from flax_transformers.training.run_state import RunPosition
from flax_transformers.training.setup import make_step_metrics
from flax_transformers.training.state import TrainState
from flax_transformers.training.stop import StopRequest

log = logging.getLogger(__name__)


class NotTogether(Exception):
    """Why one program cannot train the runs; each of them can be trained alone."""


@dataclass(eq=False)
class _Member:
    """One of the runs, and what changes between its steps."""

    run: Run
    index: int
    position: RunPosition
    totals: Totals
    diverging_steps: int
    saves: SaveSchedule
    best: bool = False
    """Whether the evaluation of the last step was the best so far."""
    failure: UserError | TooManySkipped | None = None

    def fail(self, error: UserError | TooManySkipped) -> None:
        """Leaves the run out from now on, while the others go on."""
        # Its traceback would keep the frames, and with them the states of all runs, in memory.
        self.failure = error.with_traceback(None)
        log.warning("%s ends: %s", self.run.workdir, error)


def check_together(config: TrainConfig) -> None:
    """Raises UserError for a config whose runs may end at different steps, or need more than their
    data, and in a job of several processes."""
    if jax.process_count() > 1:
        raise UserError("--together is for one process; leave it out, or start a single process")
    found = {
        "checkpoints.export_every": config.checkpoints.export_every is not None,
        "early_stopping": config.early_stopping.patience is not None,
        "max_rollbacks": config.max_rollbacks > 0,
        "objective.teacher": getattr(config.objective, "teacher", None) is not None,
        "rollouts": isinstance(config.objective, PolicyObjective),
    }
    refused = [name for name, given in found.items() if given]
    if refused:
        raise UserError(
            f"runs with {refused[0]} cannot be trained together; leave --together out, or "
            f"{refused[0]}"
        )


def check_equal_configs(configs: Sequence[TrainConfig]) -> None:
    """Raises NotTogether for configs that differ in more than their seeds, the weights they start
    from and their data, which are compared when they are opened."""
    first, *others = (to_json(replace(one, seed=0, init_from=None)) for one in configs)
    for one in others:
        names = [name for name in first if name != "data" and one[name] != first[name]]
        if names:
            raise NotTogether(f"their configs differ in {names[0]}, not only in the seed")


def train_together(ready: Sequence[ReadyRun]) -> list[loop.Outcome | Exception]:
    """Trains runs of one process to their end, each from its newest checkpoint, if any.

    Returns the outcome of each run, or why it failed: a run that diverges, or that another process
    trains, does not stop the others. Raises UserError for mistakes that concern all of them, and
    NotTogether.
    """
    found: list[loop.Outcome | Exception | None] = [None] * len(ready)
    with contextlib.ExitStack() as stack:
        runs: dict[int, Run] = {}
        for index, one in enumerate(ready):
            parts = one.config, one.prepared, one.workdir, one.evaluators
            try:
                runs[index] = stack.enter_context(loop.opened(*parts, shown=False))
            except WorkdirInUse as error:
                found[index] = error
        members, requested = _begin_and_train(runs, ready) if runs else ([], False)
    for member in members:
        found[member.index] = _ended(member, requested)
    return [one for one in found if one is not None]


def _begin_and_train(runs: dict[int, Run], ready: Sequence[ReadyRun]) -> tuple[list[_Member], bool]:
    """Trains the opened ones of the ``ready`` runs to the end or to a requested stop; also returns
    whether one was requested."""
    check_equal_configs([run.config for run in runs.values()])
    if len({run.prepared.fingerprint for run in runs.values()}) > 1:
        raise NotTogether("their data differ")
    saved = {max(finished_steps(run.checkpoints.directory), default=0) for run in runs.values()}
    if len(saved) > 1:
        raise NotTogether("they resume from different steps")
    with watchdog.phase("restore"):
        begun = [start_or_resume(run, ready[index].initial) for index, run in runs.items()]
    if len({one.position.step for one in begun}) > 1:  # a newest checkpoint was refused
        raise NotTogether("they resume from different steps")
    members = [
        _Member(
            run,
            index,
            one.position,
            one.totals,
            one.diverging_steps,
            SaveSchedule(run.config.checkpoints.every_steps),
        )
        for (index, run), one in zip(runs.items(), begun, strict=True)
    ]
    with StopRequest() as stop, watchdog.phase("step"), contextlib.ExitStack() as stack:
        for member, one in zip(members, begun, strict=True):
            _begin(member.run, one, stack)
        states = [one.state for one in begun]
        del begun, one
        _train(members, _stacked_in_place(states), stop)
        return members, stop.requested


def _begin(run: Run, begun: StartPoint, stack: contextlib.ExitStack) -> None:
    """Opens the sinks of a run, until ``stack`` is left, and makes up for a missing evaluation."""
    step = begun.position.step
    stack.enter_context(run.listeners.training(step, run.config.total_steps))
    run.clock.resume(read_metrics(run.workdir), step)
    stack.enter_context(run.listeners.writing(step))
    if begun.unevaluated:
        loop.make_up_evaluation(run, begun.state, begun.position)
    run.clock.lap("start")


def _ended(member: _Member, requested: bool) -> loop.Outcome | Exception:
    if member.failure is not None:
        return member.failure
    point = StopPoint(member.position, False, member.diverging_steps, {})
    try:
        return loop.outcome_of(member.run, point, told=requested)
    except UserError as error:
        return error


def _train(members: Sequence[_Member], state: TrainState, stop: StopRequest) -> None:
    """Trains to the end or to a requested stop."""
    config, step = members[0].run.config, members[0].position.step
    with Progress(config.total_steps, step) as progress:
        while members[0].position.step < config.total_steps and not stop.obeyed:
            for member in members:
                member.position = member.position.normalized(config)
            state = _train_phase(members, state, stop, progress)
            if all(member.failure for member in members):
                break


def _stacked_in_place(states: list[TrainState]) -> TrainState:
    """The states as one, array by array, so that no state of a whole run lies in memory twice."""
    stack = jax.jit(lambda *leaves: jnp.stack(leaves))

    def stack_and_delete(*leaves: jax.Array) -> jax.Array:
        together = jax.block_until_ready(stack(*leaves))
        for leaf in leaves:
            if isinstance(leaf, jax.Array):
                leaf.delete()
        return together

    return jax.tree.map(stack_and_delete, *states)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class _Group:
    """The programs and the metrics of a phase."""

    def __init__(self, members: Sequence[_Member], phase: AnyPhase) -> None:
        self.members, self.phase = members, phase
        trainer = members[0].run.trainer
        one_step = jax.vmap(trainer.train_step(phase.micro_batches))
        placed = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract)
        self._step = compiled_together(
            jax.jit(lambda state, batches: one_step(state, _stacked(batches)), donate_argnums=0)
        )
        self._take = jax.jit(
            lambda state, index: jax.tree.map(lambda leaf: leaf[index], state),
            out_shardings=placed,
        )
        self.evaluation_step = compiled_together(trainer.evaluation_step())
        self.metrics: dict[int, StepMetrics] = {
            m.index: make_step_metrics(m.run.config, phase, m.run.mesh, m.run.clock, m.totals)
            for m in members
        }
        self._pending: Any = None
        self._is_first = True

    @property
    def alive(self) -> list[_Member]:
        return [member for member in self.members if member.failure is None]

    def take_step(self, state: TrainState, batches: tuple[Any, ...]) -> TrainState:
        """One step of all runs; then receives the reports of the step before."""
        state, report = self._step(state, batches)
        if self._is_first:
            self.lap("compile")
            self._is_first = False
        self.receive()
        self._pending = report
        return state

    def lap(self, kind: str) -> None:
        """Counts the time since the lap before as ``kind`` in the goodput of all runs."""
        for member in self.alive:
            member.run.clock.lap(kind)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """As `StepMetrics.waiting`, for all runs."""
        self.lap("start" if self._is_first else "steps")
        yield
        busy = self._pending is not None and not self._pending.grad_norm.is_ready()
        self.lap("steps" if busy else "data_wait")

    def receive(self) -> None:
        """Hands the report of the last step to the metrics of each run."""
        if self._pending is None:
            return
        reports, self._pending = jax.device_get(self._pending), None
        self.lap("steps")
        for row, member in enumerate(self.members):
            if member.failure is None:
                metrics = self.metrics[member.index]
                metrics.sent(jax.tree.map(lambda leaf, i=row: leaf[i], reports))
                try:
                    metrics.fetch_previous()
                except TooManySkipped as error:
                    member.fail(error)
                member.diverging_steps = metrics.diverging_steps

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Excludes the time of its body from the throughput of all runs."""
        self.receive()
        with contextlib.ExitStack() as stack:
            for member in self.alive:
                stack.enter_context(self.metrics[member.index].paused(kind))
            yield

    def state_of(self, member: _Member, state: TrainState) -> TrainState:
        """A copy of the state of one run."""
        return self._take(state, self.members.index(member))


def _train_phase(
    members: Sequence[_Member], state: TrainState, stop: StopRequest, progress: Progress
) -> TrainState:
    """Trains to the end of the phase, or to a requested stop."""
    # What follows reads the config of the first run where all have the same values.
    first, config = members[0], members[0].run.config
    phase = config.phases[first.position.phase]
    group = _Group(members, phase)
    mixtures = {
        m.index: MixtureProgress(config.objective, config.phases, m.run.prepared, m.position.phase)
        for m in members
    }
    with contextlib.ExitStack() as stack:
        batches = [stack.enter_context(m.run.batches(m.position, lambda: state)) for m in members]
        logs = {
            m.index: stack.enter_context(ExampleLog(m.run.workdir, m.position.step))
            for m in members
        }
        stopping = False
        while not (stopping or first.position.done(config)) and group.alive:
            try:
                with group.waiting():
                    given = [next(one) for one in batches]
            except UserError:  # of the data, which all runs read
                if first.position.step:
                    _save(group, group.alive, state, logs, stopping=True)
                raise
            state = group.take_step(state, tuple(batch for batch, _ in given))
            for member, (_, ids) in zip(members, given, strict=True):
                member.position.examples += phase.batch_size
                member.position.step += 1
                if config.logging.example_log:
                    logs[member.index].write(member.position.step, ids)
            step, last = first.position.step, first.position.done(config)
            for member in group.alive:  # there are no callbacks that would read the state
                member.run.listeners.step(step, state)
            progress.step(step)
            if last or step % config.logging.every_steps == 0:
                _write_rows(group, step, mixtures, progress)
            _evaluate_due(group, state, logs)
            stopping = stop.check(first.run.checkpoints, step)
            due = [
                member
                for member in group.alive
                if member.saves.is_due(step, further=last or member.best) or stopping
            ]
            if due:
                _save(group, due, state, logs, stopping)
    for member in members:
        member.totals = {}
    return state


def _write_rows(
    group: _Group, step: int, mixtures: Mapping[int, MixtureProgress], progress: Progress
) -> None:
    group.receive()
    for member in group.alive:
        mixture = mixtures[member.index].row(member.position.examples)
        row = group.metrics[member.index].row(step) | mixture
        member.run.latest.update(row)
        member.run.listeners.metrics(step, row)
        if member is group.alive[0]:
            progress.write(step, row)


def _evaluate_due(group: _Group, state: TrainState, logs: Mapping[int, ExampleLog]) -> None:
    due = []
    for member in group.alive:
        position = member.position
        member.best = False
        position.evaluation_pending |= position.evaluation_is_due(member.run.config)
        if position.evaluation_pending:
            due.append(member)
    if not due:
        return
    with group.paused("evaluation"), watchdog.phase("evaluation"):
        for member in due:
            skips = group.metrics[member.index].consecutive_skips
            if member.failure or (skips and member.position.step < member.run.config.total_steps):
                continue
            own = group.state_of(member, state)
            try:
                member.best = loop.evaluate_run(
                    member.run, own, member.position, group.phase, group.evaluation_step
                )
            except UserError as error:
                _save(group, [member], state, logs, stopping=True)
                member.fail(error)


def _save(
    group: _Group,
    due: Sequence[_Member],
    state: TrainState,
    logs: Mapping[int, ExampleLog],
    stopping: bool,
) -> None:
    with group.paused("checkpoint"), watchdog.phase("save"):
        for member in (one for one in due if not one.failure):
            member.run.listeners.flush()
            logs[member.index].flush()
            own, metrics = group.state_of(member, state), group.metrics[member.index]
            if loop.save(member.run, own, member.position, metrics, stopping):
                member.saves.saved()
