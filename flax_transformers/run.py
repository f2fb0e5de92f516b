"""Train what a config describes: `flax-transformers train`, from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from flax_transformers import runtime
from flax_transformers.checkpointing.step_directories import has_checkpoint
from flax_transformers.config_json import register_types_of
from flax_transformers.data.dataset import Dataset
from flax_transformers.distillation.batches import taught_batches
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.report import introduce, report_results
from flax_transformers.evaluation.saved_baselines import baselines_of_run, keep_baselines
from flax_transformers.evaluation.tasks import Sets, evaluators
from flax_transformers.export import Exporter
from flax_transformers.monitoring.profiling import Profiling
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.post_training.reinforcement.rollouts import Scorers, batch_source
from flax_transformers.storage.workdir import check_unused, check_writable, open_workdir
from flax_transformers.training import loop, run_state
from flax_transformers.training.callbacks import Callback, Evaluator
from flax_transformers.training.check_run import check_config, check_run
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.resume import OnlineBatches
from flax_transformers.training.setup import checked_mesh


def train(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[MetricSink] = (),
    overrides: Sequence[str] = (),
    profiling: Profiling | None = None,
) -> loop.Outcome:
    """Prepares the data, trains to the last phase's end, and writes scores, samples and plots.

    A run that has a checkpoint in ``workdir`` is resumed from the newest one. In a job of several
    processes each of them calls this. ``callbacks`` are told of steps, metrics, evaluations and
    checkpoints; ``sinks`` get the metrics besides metrics.jsonl, the console and TensorBoard.
    ``overrides`` are the config's fields as they were given on the command line, which
    ``config.init_from`` may not contradict.

    Returns the last step, whether the run was preempted, and the last value of every metric.

    Raises UserError for mistakes in the config, the data or the workdir, before anything in
    ``workdir`` is overwritten.
    """
    ready = make_ready(config, workdir, callbacks=callbacks, overrides=overrides)
    outcome = loop.train_prepared(
        ready.config,
        ready.prepared,
        ready.workdir,
        ready.evaluators,
        ready.initial,
        profiling,
        ready.callbacks,
        sinks,
        ready.online,
    )
    finish(ready, outcome)
    return outcome


@dataclass(frozen=True)
class ReadyRun:
    """A run before its first step, or before it resumes."""

    config: TrainConfig
    prepared: Dataset
    workdir: epath.Path
    evaluators: Sequence[Evaluator]
    callbacks: Sequence[Callback]
    initial: Callable[[Mesh], Any] | None
    """Gives the weights that the config starts from; None: they are drawn."""
    online: OnlineBatches | None
    """Where batches come from that depend on the parameters; None: from the data alone."""
    sets: Sets
    baselines: Sequence[Baseline]


def make_ready(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    callbacks: Sequence[Callback] = (),
    overrides: Sequence[str] = (),
) -> ReadyRun:
    """Checks a run and prepares its data; see `train`. Raises UserError."""
    register_types_of(config)
    runtime.start(config.platform, config.limits)
    watchdog.start(config.limits, config.logging.hang_dump_s)
    with watchdog.phase("prepare"):
        folder = open_workdir(workdir)
        check_writable(folder)  # before the data are prepared, which can take hours
        check_unused(folder)
        # First of all, so that references, teachers and evaluators compute as the training does.
        config = run_state.with_compute_of_run(config, folder)
        config = runtime.with_initial_model(config, overrides, folder)
        checked_mesh(config)
        check_config(config)
        if jax.process_count() == 1:  # a job of several processes prepares no data
            run_state.check_same_run(config, folder)
            if not has_checkpoint(folder):
                runtime.check_known_tokenizers(config)
        of_run, trained_on = run_state.tokenizers_of_run(folder), runtime.store_of_run(folder)
        prepared = runtime.prepared_data(config.data, of_run, trained_on)
        prepared = runtime.fitted_data(config, prepared)
        check_run(config, prepared, new=not has_checkpoint(folder))
        prepared = runtime.completed_data(config, prepared, folder)
        config = runtime.with_label_names(config, prepared)
        load = runtime.teacher(config, prepared, folder)
        sets = runtime.evaluation_sets(config, prepared)
        baselines = baselines_of_run(config, prepared, folder, sets)
        introduce(config, prepared, folder, baselines)
        model = runtime.built(config)
        if config.checkpoints.export_every is not None:
            exporter = Exporter(config, model, folder, run_state.tokenizer_files(config, prepared))
            callbacks = [*callbacks, exporter]
    scorers: Scorers = {}
    initial = runtime.initial_weights(config)
    return ReadyRun(
        config=config,
        prepared=prepared,
        workdir=folder,
        evaluators=evaluators(config, prepared, model, folder, sets=sets, scorers=scorers),
        callbacks=callbacks,
        initial=initial,
        online=taught_batches(load) if load else batch_source(config, initial, scorers),
        sets=sets,
        baselines=baselines,
    )


def finish(run: ReadyRun, outcome: loop.Outcome) -> None:
    """Writes what a run leaves at its end, plots and its baselines, and prints its scores."""
    with watchdog.phase("evaluation"):  # plots and samples
        keep_baselines(run.config, run.prepared, run.workdir, run.baselines, run.sets)
        report_results(run.workdir, outcome, run.baselines)
