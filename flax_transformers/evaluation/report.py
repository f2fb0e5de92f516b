"""What ``train`` prints before and after a run: a summary, then plots, samples and scores."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from flax_transformers.adapters.lora import is_adapter
from flax_transformers.data.dataset import Dataset, training_examples
from flax_transformers.evaluation.baselines import Baseline, of_set
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.storage.workdir import read_side_file
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Outcome


def introduce(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path, baselines: Sequence[Baseline]
) -> None:
    """Prints the model, the data, the devices and the baselines of a run."""
    if jax.process_index() != 0:
        return
    devices = jax.devices()
    batch = config.phases[0]
    say(
        f"{type(config.model).__name__.removesuffix('Config')} {config.model.num_layers} layers x "
        f"{config.model.hidden_size} wide, {type(config.objective).__name__}, on "
        f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} process(es)"
    )
    if config.lora.is_on:
        say(_adapted(config))
    say(
        f"{prepared.summary}; batches of {' x '.join(map(str, batch.batch_shape))}, "
        f"{config.total_steps:,} steps"
    )
    if config.data.is_limited:
        say(_subset(config, prepared))
    for baseline in baselines:
        say(f"baseline: {baseline.line()}")
    say(f"workdir: {workdir}")


def _subset(config: TrainConfig, prepared: Dataset) -> str:
    """How many of the examples are trained on."""
    spec = config.objective.window_spec(config.phases[0].sequence_length)
    chosen, whole = (training_examples(prepared, spec, d, config.seed) for d in (config.data, None))
    each, most = config.data.examples_per_class, config.data.max_training_examples
    total = len(whole) if whole.documents is None else len(np.unique(whole.documents))
    of_classes = (
        "" if each is None else f", {each:,} of each of {len(prepared.label_names):,} classes"
    )
    return (
        f"trained on a subset of {len(chosen) if most is None else min(most, total):,} of "
        f"{total:,} examples{of_classes}, chosen by seed {config.seed}"
    )


def _adapted(config: TrainConfig) -> str:
    """How many of the parameters are trained, where adapters are."""
    boxed, adapters = adapted_shapes(build_model(config.model), config.lora)
    leaves = flatten_dict(nn.meta.unbox(boxed))
    sizes = {name: leaf.size for name, leaf in leaves.items()}
    whole = () if adapters is None else adapters.fully_trained
    trained = sum(size for name, size in sizes.items() if is_adapter(name) or name in whole)
    return (
        f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.targets)}: {trained:,} of "
        f"{sum(sizes.values()):,} parameters are trained"
    )


def report_results(workdir: epath.Path, outcome: Outcome, baselines: Sequence[Baseline]) -> None:
    """Draws the plots, and prints samples, scores and where the files are."""
    if jax.process_index() != 0:
        return
    from flax_transformers.monitoring.plots import plot_metrics  # slow to import

    losses = {one.name: one.score for one in baselines if one.metric == "eval/loss"}
    try:
        plot_metrics(read_metrics(workdir), workdir / "plots", losses)
    except Exception as error:  # the run itself is saved
        logging.getLogger(__name__).warning("no plots could be written: %s", error)
    if outcome.preempted or outcome.stopped:
        say(
            f"stopped on request after step {outcome.step:,}; a checkpoint is saved: the same "
            "command resumes from it"
        )
        return
    samples = workdir / "samples" / f"step_{outcome.step:08d}.txt"
    if samples.exists() and (shown := read_side_file(samples)) is not None:
        say(f"\nHeld-out text and the model's predictions:\n\n{shown}")
    for line in _parts(outcome.metrics):
        say(line)
    scores = {name: score for name, score in outcome.metrics.items() if name.startswith("eval/")}
    for baseline in baselines:
        if baseline.metric in scores:
            say(baseline.verdict(scores[baseline.metric]))
    for name in sorted(scores.keys() - {baseline.metric for baseline in baselines}):
        say(f"held-out {name.removeprefix('eval/').replace('_', ' ')} {scores[name]:.4g}")
    say(f"checkpoint {workdir / 'checkpoints' / str(outcome.step)}")
    say(f"plots      {workdir / 'plots'}")


def table_of_sets(
    scores: Mapping[str, float], sets: Sequence[str], baselines: Sequence[Baseline]
) -> str:
    """A line for the held-out data of a run, if it has any, and one for each evaluation set.

    ``scores``: those of the run by metric; ``sets``: the names. The columns are the metrics, and
    the baselines on the same data.
    """
    rows: dict[str, dict[str, str]] = {name: {} for name in ("held-out", *sets)}
    for metric, score in scores.items():
        name, _, kind = metric.removeprefix("eval/").partition("/")
        if name in sets and kind:
            rows[name][kind] = f"{score:.4f}"
        elif metric.startswith("eval/"):
            rows["held-out"][name] = f"{score:.4f}"
    columns = sorted({kind for name in sets for kind in rows[name]})
    for one in baselines:
        if not one.part or one.metric.startswith(of_set("", one.part)):
            rows[one.part or "held-out"][f"{one.name} ({one.measured})"] = f"{one.score:.4f}"
    columns += sorted({kind for name in sets for kind in rows[name]}.difference(columns))
    width = max(map(len, ["set", *rows]))
    lines = [f"{'set':{width}}" + "".join(f"  {kind:>6}" for kind in columns)]
    for name, row in rows.items():
        cells = (f"  {row.get(kind, '-'):>{max(6, len(kind))}}" for kind in columns)
        if row:
            lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)


def _parts(metrics: Mapping[str, float]) -> Iterator[str]:
    """A line for each component of a mixture: examples trained on, and its held-out loss."""
    for metric, examples in metrics.items():
        name = metric.removeprefix("train/examples_")
        if name == metric or f"train/tokens_{name}" not in metrics:  # a metric of the user's own
            continue
        loss = metrics.get(f"eval/loss_{name}")
        yield (
            f"{name}: {examples:,.0f} examples, {metrics[f'train/tokens_{name}']:,.0f} tokens, "
            f"{metrics[f'train/epochs_{name}']:.2f} epochs"
            + ("" if loss is None else f", held-out loss {loss:.3f}")
        )


def say(text: str) -> None:
    """Prints; a closed pipe or a full disk does not end a run."""
    try:
        print(text, flush=True)
    except OSError:  # also a full disk
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (closed with the process)
