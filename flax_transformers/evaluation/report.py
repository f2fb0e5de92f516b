"""What ``train`` says before and after: the run in a few lines, plots, samples, scores."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
from etils import epath

from flax_transformers.data.dataset import Dataset
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.monitoring.plots import plot_metrics
from flax_transformers.storage.workdir import read_side_file
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Outcome


def introduce(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path, baselines: Sequence[Baseline]
) -> None:
    """Says what is about to be trained, on what, and what there is to beat."""
    if jax.process_index() != 0:
        return
    devices = jax.devices()
    batch = config.phases[0]
    _say(
        f"{type(config.model).__name__.removesuffix('Config')} {config.model.num_layers} layers x "
        f"{config.model.hidden_size} wide, {type(config.objective).__name__}, on "
        f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} process(es)"
    )
    _say(
        f"{prepared.summary}; batches of {' x '.join(map(str, batch.batch_shape))}, "
        f"{config.total_steps:,} steps"
    )
    for baseline in baselines:
        _say(f"to beat: {baseline.line()}")
    _say(f"workdir: {workdir}")


def finish(workdir: epath.Path, outcome: Outcome, baselines: Sequence[Baseline]) -> None:
    """Draws the plots and says how it went and where things are."""
    if jax.process_index() != 0:
        return
    losses = {one.name: one.score for one in baselines if one.metric == "eval/loss"}
    try:
        plot_metrics(read_metrics(workdir), workdir / "plots", losses)
    except Exception as error:  # such as numbers that no axis holds; the run itself is saved
        logging.getLogger(__name__).warning("no plots could be written: %s", error)
    if outcome.preempted:
        _say(
            f"stopped on request after step {outcome.step:,}; all is saved: the same command "
            "goes on from here"
        )
        return
    samples = workdir / "samples" / f"step_{outcome.step:08d}.txt"
    if samples.exists() and (shown := read_side_file(samples)) is not None:
        _say(f"\nHeld-out text and what the model makes of it:\n\n{shown}")
    for line in _parts(outcome.metrics):
        _say(line)
    for baseline in baselines:
        score = outcome.metrics.get(baseline.metric)
        if score is not None:
            _say(baseline.verdict(score))
    _say(f"checkpoint {workdir / 'checkpoints' / str(outcome.step)}")
    _say(f"plots      {workdir / 'plots'}")


def _parts(metrics: Mapping[str, float]) -> Iterator[str]:
    """A line for each part of a mixture: what was trained on, and its own held-out loss."""
    for metric, examples in metrics.items():
        name = metric.removeprefix("train/examples_")
        if name == metric:
            continue
        loss = metrics.get(f"eval/loss_{name}")
        yield (
            f"{name}: {examples:,.0f} examples, {metrics[f'train/tokens_{name}']:,.0f} tokens, "
            f"{metrics[f'train/epochs_{name}']:.2f} epochs"
            + ("" if loss is None else f", held-out loss {loss:.3f}")
        )


def _say(text: str) -> None:
    """Prints; a reader that went away must not end a training run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (closed with the process)
