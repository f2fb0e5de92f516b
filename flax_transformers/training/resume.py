"""Where a run starts: from a fresh state, its newest checkpoint, or one before a divergence."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flax_transformers.checkpointing.manager import Checkpoints
from flax_transformers.checkpointing.step_directories import write_files
from flax_transformers.config_json import to_json
from flax_transformers.data.dataset import Dataset
from flax_transformers.errors import UserError
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.metrics import Totals
from flax_transformers.monitoring.profiling import Profiling
from flax_transformers.monitoring.throughput import REMEDY
from flax_transformers.optim.finite import is_finite
from flax_transformers.storage.workdir import set_aside_file, write_side_file, writing
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.callbacks import Evaluator, Listeners
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.run_state import RunPosition, check_meta, reason_to_stop_early
from flax_transformers.training.state import TrainState
from flax_transformers.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run that do not change between its steps."""

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
    online: OnlineBatches | None = None
    """Where batches come from that depend on the parameters; None: from the data alone."""

    @property
    def is_writer(self) -> bool:
        return jax.process_index() == 0

    def batches(
        self, position: RunPosition, state: Callable[[], TrainState]
    ) -> AbstractContextManager[Batches]:
        """The batches from ``position`` on; see ``online``."""
        if self.online is not None:
            return self.online(self, position, state)
        return batches_on_mesh(self.config, self.prepared, self.mesh, position)


Batches = Iterator[tuple[dict[str, jax.Array], np.ndarray]]
"""Batches on the mesh, each with the ids of this process's examples."""

OnlineBatches = Callable[
    [Run, RunPosition, Callable[[], TrainState]], AbstractContextManager[Batches]
]
"""``(run, position, state)`` gives the batches from ``position`` on, which moves along; ``state()``
is that after the last step. A UserError that it raises ends the run after a checkpoint; of
several processes only an AgreedError, which all raise."""


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts or resumes."""

    state: TrainState
    position: RunPosition
    totals: Totals
    """Sums and counts of the steps after the last row of metrics."""
    diverging_steps: int = 0
    """Consecutive steps up to this position that were skipped for values that are not finite."""
    unevaluated: bool = False
    """Whether the checkpoint lacks the evaluation of its step, as after one that failed."""


@dataclass(frozen=True)
class StopPoint:
    """Where a run stopped, and the data it consumed, for a rollback."""

    position: RunPosition
    diverged: bool
    """Whether too many consecutive steps were skipped, so that it has to roll back."""
    diverging_steps: int
    """Consecutive steps up to the last one that were skipped for values that are not finite."""
    consumed: dict[int, int]
    """Examples consumed by phase, of the phases that were trained in."""


def start_or_resume(run: Run, initial: Callable[[Mesh], Any] | None) -> StartPoint:
    """The state of the newest checkpoint, or a fresh one; writes config and tokenizers.

    ``initial`` gives the parameters that a fresh state has, on the mesh; None: they are drawn.
    """
    begun = _restore(run, is_not_finite)
    if begun is None:
        state = run.trainer.init(run.config.seed)
        if initial is not None:
            state = state.starting_from(initial(run.mesh), run.trainer.optimizer)
        begun = StartPoint(state, RunPosition(), {})
    elif begun.position.step >= run.config.total_steps:
        log.info(
            "already trained to step %d; raise phases.*.steps to train further", begun.position.step
        )
    elif (reason := reason_to_stop_early(run.config, begun.position)) is not None:
        log.info(
            "already finished at step %d: %s; raise early_stopping.patience to train further",
            begun.position.step,
            reason,
        )
    else:
        log.info("resuming from step %d", begun.position.step)
    if run.is_writer:
        write_side_file(run.workdir / "config.json", json.dumps(to_json(run.config), indent=1))
        _write_tokenizers(run)
    return begun


def _write_tokenizers(run: Run) -> None:
    """For people and other programs: checkpoints have their own copies."""
    try:
        write_files(run.workdir, run.tokenizer_files)
    except OSError as error:
        for name in {name.partition("/")[0] for name in run.tokenizer_files}:
            set_aside_file(run.workdir / name, f"cannot be written ({error.strerror or error})")
        with writing(run.workdir / "tokenizer"):
            write_files(run.workdir, run.tokenizer_files)


def _restore(
    run: Run, refuse: Callable[[TrainState, dict[str, Any]], str | None]
) -> StartPoint | None:
    """From the newest checkpoint that is not refused."""
    restored = run.checkpoints.restore_newest(
        run.trainer.abstract,
        check=lambda meta: check_meta(meta, run.config, run.prepared, run.workdir),
        refuse=refuse,
    )
    if restored is None:
        return None
    meta, position = restored.meta, RunPosition.saved_in(restored.meta)
    run.latest.update(meta["metrics"])
    evaluated = {row["step"] for row in meta.get("evaluations", [{"step": position.step}])}
    due = position.evaluation_is_due(run.config) and not position.evaluation_pending
    return StartPoint(
        restored.state.completed(run.trainer.abstract, run.trainer.model),
        position,
        meta.get("totals", {}),
        meta.get("diverging_steps", 0),
        due and position.step not in evaluated,
    )


def roll_back(run: Run, ended: StopPoint) -> StartPoint:
    """The newest checkpoint before the skipped steps that ``ended`` the run, and the data after
    them. Raises UserError if there is no checkpoint."""
    begun = _restore(run, is_unproven)
    if begun is None:
        raise UserError(
            "too many steps in a row were skipped before the first checkpoint, and the run cannot "
            f"roll back; {REMEDY}, or save earlier, with checkpoints.every_steps"
        )
    position = begun.position.normalized(run.config)
    # If the skipped steps span two phases, the first continues after the examples it had consumed.
    examples = max(position.examples, ended.consumed.get(position.phase, 0))
    log.warning(
        "rolled back to step %d; the %d examples since are left out",
        position.step,
        examples - position.examples,
    )
    position = replace(position, examples=examples, rollbacks=ended.position.rollbacks + 1)
    return replace(begun, position=position)


def is_not_finite(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Why a run cannot resume from a checkpoint, or None."""
    if meta.get("consecutive_skips") == 0:  # tested by the step before it was saved
        return None
    finite = jax.jit(is_finite)(state.params, (state.opt_state, state.model_state), state.ema)
    return None if finite else "holds values that are not finite"


def is_unproven(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Why a run cannot roll back to a checkpoint, or None."""
    if int(state.consecutive_skips):
        return "was saved while steps were being skipped"
    return is_not_finite(state, meta)
