"""What ``train`` says before and after: the run in a few lines, plots, samples, scores."""

from __future__ import annotations

import logging
import os
import sys

import jax
from etils import epath

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.prepare import PreparedText
from flax_transformers.data.store import TokenStore, unigram_cross_entropy
from flax_transformers.evaluation.held_out import held_out_evaluator
from flax_transformers.generation.fill_mask import format_samples, held_out_samples
from flax_transformers.objectives.masked_lm import Masking
from flax_transformers.objectives.sequences import SequenceLoss
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Outcome, Snapshot
from flax_transformers.training.metrics import read_metrics
from flax_transformers.training.plots import plot_metrics
from flax_transformers.training.workdir import write_text

SAMPLES = 6


def introduce(config: TrainConfig, prepared: Dataset, workdir: epath.Path) -> None:
    """Says what is about to be trained, on what, and the baseline to beat."""
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
        f"{prepared.summary}; batches of {batch.batch_size} x {batch.sequence_length}, "
        f"{config.total_steps:,} steps"
    )
    baseline = unigram_baseline(config, prepared)
    if baseline is not None:
        _say(f"unigram cross-entropy of the held-out text: {baseline:.3f} nats, the line to beat")
    _say(f"workdir: {workdir}")


def unigram_baseline(config: TrainConfig, prepared: Dataset) -> float | None:
    """Nats per token that knowing how common each piece is would give.

    None without held-out text, and where what is predicted is not simply pieces of the text.
    """
    if not isinstance(prepared, PreparedText) or prepared.validation is None:
        return None
    if isinstance(config.objective, SequenceLoss):
        return None
    return unigram_cross_entropy(prepared.train, prepared.validation)


def evaluators(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path | None
) -> list[Evaluator]:
    """What looks at a run of this config: held-out scores, and samples if there is a workdir."""
    chosen = [held_out_evaluator(config, prepared)]
    if workdir is None or not isinstance(prepared, PreparedText) or prepared.validation is None:
        return chosen
    if isinstance(config.objective, Masking):
        chosen.append(_gap_filler(prepared, prepared.validation, workdir))
    return chosen


def _gap_filler(prepared: PreparedText, validation: TokenStore, workdir: epath.Path) -> Evaluator:
    """Writes held-out sentences with a gap, and what the model fills in, at each evaluation."""

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        samples = held_out_samples(
            snapshot.functions,
            snapshot.params,
            prepared.tokenizer,
            validation,
            count=SAMPLES,
            max_length=snapshot.phase.sequence_length,
        )
        if jax.process_index() == 0:
            path = workdir / "samples" / f"step_{snapshot.step:08d}.txt"
            write_text(path, format_samples(samples) + "\n")
        return {}

    return evaluate


def finish(config: TrainConfig, prepared: Dataset, workdir: epath.Path, outcome: Outcome) -> None:
    """Draws the plots and says how it went and where things are."""
    if jax.process_index() != 0:
        return
    baseline = unigram_baseline(config, prepared)
    baselines = {} if baseline is None else {"unigram cross-entropy": baseline}
    try:
        plot_metrics(read_metrics(workdir), workdir / "plots", baselines)
    except OSError as error:  # the run itself is saved
        logging.getLogger(__name__).warning("no plots could be written: %s", error)
    if outcome.preempted:
        _say(
            f"stopped on request after step {outcome.step:,}; all is saved: the same command "
            "goes on from here"
        )
        return
    samples = workdir / "samples" / f"step_{outcome.step:08d}.txt"
    if samples.exists():
        _say("\nHeld-out sentences, a gap, and the model's three likeliest pieces:\n")
        _say(samples.read_text())
    loss = outcome.metrics.get("eval/loss")
    if loss is not None and baseline is not None:
        _say(
            f"held-out loss {loss:.3f}, unigram cross-entropy {baseline:.3f}: "
            f"{abs(baseline - loss):.3f} nats {'better' if loss <= baseline else 'worse'}"
        )
    _say(f"checkpoint {workdir / 'checkpoints' / str(outcome.step)}")
    _say(f"plots      {workdir / 'plots'}")


def _say(text: str) -> None:
    """Prints; a reader that went away must not end a training run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (closed with the process)
