"""Train what a config describes: `flax-transformers train`, from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from flax_transformers import runtime
from flax_transformers.checkpointing.step_directories import has_checkpoint
from flax_transformers.config_json import register_types_of
from flax_transformers.distillation.batches import taught_batches
from flax_transformers.evaluation.report import introduce, report_results
from flax_transformers.evaluation.saved_baselines import baselines_of_run, keep_baselines
from flax_transformers.evaluation.tasks import evaluators
from flax_transformers.export import Exporter
from flax_transformers.monitoring.profiling import Profiling
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.post_training.reinforcement.rollouts import Scorers, batch_source
from flax_transformers.storage.workdir import check_unused, check_writable, open_workdir
from flax_transformers.training import loop, run_state
from flax_transformers.training.callbacks import Callback
from flax_transformers.training.check_run import check_config, check_run
from flax_transformers.training.config import TrainConfig
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
    outcome = loop.train_prepared(
        config,
        prepared,
        folder,
        evaluators(config, prepared, model, folder, sets=sets, scorers=scorers),
        runtime.initial_weights(config),
        profiling,
        callbacks,
        sinks,
        taught_batches(load)
        if load
        else batch_source(config, runtime.initial_weights(config), scorers),
    )
    with watchdog.phase("evaluation"):  # plots and samples
        keep_baselines(config, prepared, folder, baselines, sets)
        report_results(folder, outcome, baselines)
    return outcome
