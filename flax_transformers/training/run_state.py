"""The position of a run, and the meta of its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
from etils import epath

from flax_transformers.checkpointing.retention import evaluations_since_best
from flax_transformers.checkpointing.step_directories import (
    config_of_run,
    finished_steps,
    problems,
    read_meta,
)
from flax_transformers.config_json import current_names, from_json, to_json
from flax_transformers.data.dataset import TOKENIZERS, Dataset, tokenizers
from flax_transformers.data.tokenizers.load import Tokenizer, load_tokenizer
from flax_transformers.errors import AgreedError, UserError
from flax_transformers.models.config import ComputeConfig
from flax_transformers.monitoring.metrics import Totals
from flax_transformers.objectives.rows import run_frame
from flax_transformers.storage.paths import is_bucket, list_files
from flax_transformers.training.config import TrainConfig, check_resumable
from flax_transformers.training.setup import fastest_compute

log = logging.getLogger(__name__)

STATE_VERSION = 1
"""Of the training state in a checkpoint. A new optional field of `TrainState` does not change it;
a field that changes its meaning does."""


@dataclass
class RunPosition:
    """The position of a run: steps taken, the phase, and the examples of it that were consumed.

    A run that rolled back (``rollbacks`` times) has consumed more examples than its steps took.
    ``evaluations``: the "step" of each evaluation so far, and the metrics that the run watches.
    ``evaluation_pending``: one that was due at a step that was skipped, whose model cannot be kept
    as the best, is done after the next step that is not.
    """

    step: int = 0
    phase: int = 0
    examples: int = 0
    rollbacks: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    evaluation_pending: bool = False

    @classmethod
    def saved_in(cls, meta: dict[str, Any]) -> RunPosition:
        """The position in a checkpoint's meta."""
        position = current_names(cls, meta["position"])
        evaluations, pending = list(meta.get("evaluations", ())), meta.get("evaluation_pending")
        return cls(**position, evaluations=evaluations, evaluation_pending=bool(pending))

    def evaluated(self, config: TrainConfig, scores: Mapping[str, float]) -> bool:
        """Notes an evaluation at this step; whether it is the best so far, and is to be saved.

        Raises AgreedError if it has not the metric that early stopping, or keeping the best
        checkpoints, depends on.
        """
        kept, (stopping, _) = config.retention, config.stopping_metric
        needed = []
        if config.early_stopping.patience is not None:
            needed.append(("early stopping", stopping, "early_stopping.metric"))
        if config.checkpoints.keep_best and scores:
            needed.append(("checkpoints.keep_best", kept.best_metric, "checkpoints.best_metric"))
        for purpose, metric, name in needed:
            if metric not in scores:
                raise AgreedError(
                    f"the metric of {purpose}, {metric!r}, is not among those of the evaluation: "
                    f"{', '.join(sorted(scores)) or 'none'}; set {name} to one of them"
                )
        watched = {name: scores[name] for name in (kept.best_metric, stopping) if name in scores}
        self.evaluations.append({"step": self.step, **watched})
        if not kept.keep_best or kept.best_metric not in scores:
            return False
        return not evaluations_since_best(self.evaluations, kept.best_metric, kept.mode)

    def done(self, config: TrainConfig) -> bool:
        """Whether the phase is over."""
        return self.step >= sum(phase.steps for phase in config.phases[: self.phase + 1])

    def evaluation_is_due(self, config: TrainConfig) -> bool:
        """Whether the model of this step is to be evaluated."""
        every = config.evaluation.every_steps
        return self.done(config) or bool(every and self.step % every == 0)

    def normalized(self, config: TrainConfig) -> RunPosition:
        """The same position, as the start of the next phase if this one is over."""
        return replace(self, phase=self.phase + 1, examples=0) if self.done(config) else self


def reason_to_stop_early(config: TrainConfig, position: RunPosition) -> str | None:
    """Why a run at ``position`` ends before its last step, or None: a function of the evaluations
    alone, so that it is equal in every process and after a restart."""
    settings, (metric, mode) = config.early_stopping, config.stopping_metric
    scored = [row for row in position.evaluations if metric in row]
    since = evaluations_since_best(scored, metric, mode, settings.min_delta)
    if settings.patience is None or since < settings.patience:
        return None
    if since == len(scored):
        return f"{metric} was not finite in {since} evaluations"
    best = scored[-1 - since]
    return (
        f"{metric} has not improved in {since} evaluation(s) since step {best['step']:.0f}, where "
        f"it was {best[metric]:.4g}"
    )


def checkpoint_meta(
    config: TrainConfig,
    prepared: Dataset,
    position: RunPosition,
    metrics: dict[str, float],
    totals: Totals,
    consecutive_skips: int,
    diverging_steps: int,
) -> dict[str, Any]:
    """The JSON that goes with a checkpoint.

    ``totals`` are the sums and counts of metrics since the last row, ``consecutive_skips`` the
    consecutive steps up to this one that were skipped, and ``diverging_steps`` the same if the last
    was skipped for values that are not finite, else 0.
    """
    where = asdict(position)
    # Apart: earlier versions read the position.
    evaluations, pending = where.pop("evaluations"), where.pop("evaluation_pending")
    return {
        "state_version": STATE_VERSION,
        "config": to_json(config),
        "tokenizer": None,
        **_fingerprints(prepared),
        "store": prepared.fingerprint,
        "position": where,
        "evaluations": evaluations,
        "evaluation_pending": pending,
        "metrics": metrics,
        "totals": {name: list(pair) for name, pair in totals.items()},
        "consecutive_skips": consecutive_skips,
        "diverging_steps": diverging_steps,
    }


def check_same_run(config: TrainConfig, workdir: epath.Path) -> None:
    """Raises UserError if the newest intact checkpoint of a local ``workdir`` is of another run.

    Before the data are prepared, which can take hours. When they are, `check_meta` compares them
    too, and the config with the names of their classes.
    """
    directory = workdir / "checkpoints"
    for step in reversed([] if is_bucket(directory) else finished_steps(directory)):
        folder = directory / str(step)
        if problems(folder) != []:
            continue
        saved = config_of_run(read_meta(folder), workdir)
        try:
            trained = from_json(saved).model
        except UserError:  # of another version: `check_meta` says so
            return
        names = config.model.label_names or trained.label_names
        named = replace(config, model=replace(config.model, label_names=names))
        check_resumable(saved, named, f"the checkpoint in {workdir}")
        return


def check_meta(
    meta: dict[str, Any], config: TrainConfig, prepared: Dataset, workdir: epath.Path
) -> None:
    """Raises UserError for a checkpoint of another run; logs what changed in the config."""
    where = f"the checkpoint in {workdir}"
    version = meta.get("state_version", 1)
    if version > STATE_VERSION:
        raise UserError(
            f"{where} has a state of version {version}, and this version of flax_transformers "
            f"reads versions up to {STATE_VERSION}; use the version that wrote it"
        )
    for change in check_resumable(config_of_run(meta, workdir), config, where):
        log.info("changed since the checkpoint: %s", change)
    trained_with = {name: meta[name] for name in TOKENIZERS if meta.get(name) is not None}
    if trained_with != _fingerprints(prepared):
        raise UserError(
            f"{where} was trained with another tokenizer than that of the token store "
            f"{prepared.directory}; set --data.store to the store it was trained on, or to a new "
            "folder: a store that is made there gets the tokenizer of the checkpoint"
        )
    if meta["store"] not in (prepared.fingerprint, *prepared.known_as):
        raise UserError(
            f"{where} was trained on other data than the store "
            f"{prepared.directory} holds, which would shift its position in the data; set "
            "--data.store to the store it was trained on, or choose another --workdir"
        )
    position, phases = RunPosition.saved_in(meta), config.phases
    trained = [from_json(phase) for phase in meta["config"]["phases"]]
    number, before = position.phase, sum(phase.steps for phase in trained[: position.phase])
    if position.done(config):
        number, before = number + 1, position.step
    if position.step < config.total_steps and before != sum(one.steps for one in phases[:number]):
        raise UserError(
            f"{where} has trained phases of {before} steps before phases.{number}, the config has "
            "others; keep the steps of the phases that are done, and change those of later ones"
        )
    saved = trained[position.phase].sequence_length
    if not position.done(config) and phases[position.phase].sequence_length != saved:
        raise UserError(
            f"{where} is in the middle of a phase with sequence_length {saved}, the config has "
            f"{phases[position.phase].sequence_length}; finish the phase, or choose another "
            "--workdir"
        )


def tokenizer_files(config: TrainConfig, prepared: Dataset) -> dict[str, bytes]:
    """The files of the run's tokenizers by their path in a checkpoint."""
    files: dict[str, bytes] = {}
    frame = run_frame(config.objective, prepared.vocabulary)
    for name, tokenizer in tokenizers(prepared).items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = epath.Path(scratch)
            tokenizer.save(folder, frame if name == "tokenizer" else None)
            for file in list_files(folder):
                files[f"{name}/{file}"] = (folder / file).read_bytes()
    return files


def with_compute_of_run(config: TrainConfig, workdir: epath.Path) -> TrainConfig:
    """``config`` with the dropout generator and the dtype of the newest checkpoint in ``workdir``
    where it leaves them open, so that a run that is resumed by a newer version, or on another
    machine, computes as before. On a CPU a new run gets the dtype that is faster there."""
    saved, compute = _saved_compute(workdir), config.compute
    if saved is None:
        used = fastest_compute(compute, jax.default_backend(), jax.device_count())
        return replace(config, compute=used)
    if compute.dropout_generator == "auto":
        compute = replace(compute, dropout_generator=saved.dropout_generator)
    if compute.dtype == "auto" and jax.default_backend() == "cpu":
        reduced = saved.gradient_reduce_dtype
        compute = replace(compute, dtype=saved.dtype, gradient_reduce_dtype=reduced)
    return replace(config, compute=compute)


def _saved_compute(workdir: epath.Path) -> ComputeConfig | None:
    """That of the newest checkpoint; None without one."""
    for step in reversed(finished_steps(workdir / "checkpoints")):
        with contextlib.suppress(UserError):
            saved = read_meta(workdir / "checkpoints" / str(step)).get("config", {})
            compute = from_json(current_names(TrainConfig, saved).get("compute"))
            if isinstance(compute, ComputeConfig):
                return compute
    return None


def tokenizers_of_run(workdir: epath.Path) -> dict[str, Tokenizer]:
    """The tokenizers in the newest checkpoint that has intact ones; none without a checkpoint."""
    directory = workdir / "checkpoints"
    for step in reversed(finished_steps(directory)):
        folders = {name: directory / str(step) / name for name in TOKENIZERS}
        with contextlib.suppress(UserError):
            found = {name: load_tokenizer(at) for name, at in folders.items() if at.exists()}
            if found:
                return found
    return {}


def _fingerprints(prepared: Dataset) -> dict[str, str]:
    return {name: tokenizer.fingerprint for name, tokenizer in tokenizers(prepared).items()}
