"""How runs with each objective are evaluated: baselines, evaluators and samples.

`TASKS` is the one table, by type of the objective; a subclass has the entry of its nearest base.
An objective of the user's own may add one. Without an entry it has its own held-out metrics alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.images.image_text import PreparedPairs
from flax_transformers.evaluation import classification, reconstructions
from flax_transformers.evaluation.baselines import (
    Baseline,
    masked_token_baselines,
    next_sentence_baselines,
    next_token_baselines,
    of_all_parts,
    of_set,
    target_token_baselines,
)
from flax_transformers.evaluation.class_report import ClassReport
from flax_transformers.evaluation.contrastive.retrieval import pair_baselines, retrieval
from flax_transformers.evaluation.contrastive.zero_shot import zero_shot_evaluator
from flax_transformers.evaluation.features.probes import probe_evaluator
from flax_transformers.evaluation.held_out import (
    Reader,
    Readers,
    held_out_evaluator,
    of_component,
)
from flax_transformers.evaluation.predictions import once_per_shape, scored_prediction_step
from flax_transformers.evaluation.question_answering import question_baselines, question_reader
from flax_transformers.evaluation.samples import answered_samples, continued_samples, filled_samples
from flax_transformers.evaluation.scoring.choices import choice_baselines
from flax_transformers.evaluation.tagging import entity_reader, tagging_baselines
from flax_transformers.evaluation.translation import translation_evaluator
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives.base import Objective
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.objectives.masked_lm import Masking
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.replaced_tokens import ReplacedTokenDetection
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.sequences import SequenceLoss
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.objectives.videos import MaskedVideo, VideoClassification
from flax_transformers.parallel.distributed import compiled_together
from flax_transformers.post_training.reinforcement.held_out_rewards import reward_evaluator
from flax_transformers.post_training.reinforcement.policy import PolicyObjective
from flax_transformers.post_training.reinforcement.rollouts import Scorers
from flax_transformers.storage.workdir import write_side_file
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import compile_evaluation_step


@dataclass(frozen=True)
class EvaluatedRun:
    """Arguments of evaluators and samples: a run, or its part on one component of a mixture."""

    config: TrainConfig
    prepared: Any
    """The data, of the kind that the objective reads."""
    model: nn.Module
    workdir: epath.Path | None
    """None where nothing is to be written."""
    part: str = ""
    """Name of the component, or of the evaluation set; empty for data without components."""
    report: ClassReport | None = None
    """Where scores of single classes go; None: they are not reported."""
    scorers: Scorers = field(default_factory=dict)
    """The rewards of a policy."""

    @property
    def predictions(self) -> epath.Path | None:
        """Folder of the predictions, if they are written."""
        return None if self.workdir is None else self.workdir / "predictions" / self.part


Sample = Callable[[Snapshot], str]
Sets = Sequence[tuple[str, Dataset]]
"""Evaluation sets by name, each as the held-out data of a `Dataset`."""


@dataclass(frozen=True)
class Task:
    """How a run with an objective is evaluated.

    ``baselines(config, data)`` scores guesses without a model. ``evaluators(run)`` gives functions
    of a snapshot that return scores, or write files. ``sample(run)`` gives a function of a snapshot
    that returns held-out text with the model's output as plain text. ``reader(run)`` gives a
    `Reader` of the predictions of an objective that `Predicts`, or None: they are made in the pass
    over the data that the objective's own metrics need. ``held_out(run)`` gives an evaluator that
    takes the place of these metrics and of the reader.
    """

    baselines: Callable[[TrainConfig, Any], list[Baseline]] | None = None
    evaluators: Callable[[EvaluatedRun], list[Evaluator]] | None = None
    sample: Callable[[EvaluatedRun], Sample] | None = None
    held_out: Callable[[EvaluatedRun], Evaluator] | None = None
    reader: Callable[[EvaluatedRun], Reader | None] | None = None


_TRANSLATION_METRICS = ("bleu", "chrf", "rouge")


def _translation(run: EvaluatedRun) -> list[Evaluator]:
    kept = run.config.retention
    name = kept.best_metric.rpartition("/")[2]  # also of an evaluation set
    depends = kept.keep_best and name.startswith(_TRANSLATION_METRICS)
    every = depends or run.config.early_stopping.patience is not None
    at_step = None if every or run.workdir is None else run.config.total_steps
    return translation_evaluator(run.config, run.prepared, run.model, at_step, run.predictions)


def _reconstruction(run: EvaluatedRun) -> list[Evaluator]:
    if run.workdir is None or run.part:
        return []
    return [reconstructions.reconstruction_evaluator(run.config, run.prepared, run.workdir)]


def _classes(run: EvaluatedRun) -> Reader:
    return classification.classification_reader(run.prepared, run.report)


def _image_classes(run: EvaluatedRun) -> Reader | None:
    """None without a report: a matrix of all classes for two more scores can be large."""
    return _classes(run) if run.report is not None else None


def _zero_shot(run: EvaluatedRun) -> list[Evaluator]:
    if isinstance(run.prepared, PreparedPairs) and run.prepared.labelled is not None:
        return [zero_shot_evaluator(run.config, run.prepared)]
    return []


def _answered(run: EvaluatedRun) -> Sample:
    return answered_samples(run.config, run.prepared, run.model)


TASKS: dict[type, Task] = {
    Masking: Task(masked_token_baselines, sample=lambda run: filled_samples(run.prepared)),
    ReplacedTokenDetection: Task(masked_token_baselines),
    NextSentence: Task(next_sentence_baselines, sample=lambda run: filled_samples(run.prepared)),
    LMLoss: Task(next_token_baselines),
    CausalLM: Task(
        next_token_baselines,
        sample=lambda run: continued_samples(run.config, run.prepared, run.model),
    ),
    SequenceLoss: Task(target_token_baselines, sample=_answered),
    SequenceToSequence: Task(target_token_baselines, _translation, _answered),
    SequenceClassification: Task(classification.classification_baselines, reader=_classes),
    TokenClassification: Task(
        tagging_baselines,
        reader=lambda run: entity_reader(run.config, run.prepared, run.report),
    ),
    QuestionAnswering: Task(
        question_baselines,
        reader=lambda run: question_reader(run.config, run.prepared, run.predictions),
    ),
    MultipleChoice: Task(choice_baselines),
    ImageClassification: Task(classification.image_baselines, reader=_image_classes),
    MaskedImage: Task(reconstructions.reconstruction_baselines, _reconstruction),
    MaskedVideo: Task(),
    VideoClassification: Task(),
    PolicyObjective: Task(
        held_out=lambda run: reward_evaluator(run.config, run.prepared, run.model, run.scorers)
    ),
    ImageTextContrastive: Task(pair_baselines, _zero_shot, reader=lambda run: retrieval),
}


def task_of(objective: Objective) -> Task:
    """The entry of the objective's type in `TASKS`, or of its nearest base class."""
    return next((TASKS[kind] for kind in type(objective).__mro__ if kind in TASKS), Task())


def baselines(config: TrainConfig, prepared: Dataset, sets: Sets = ()) -> list[Baseline]:
    """The baselines of a run; none without held-out data.

    Of a mixture those of each component, after their means over the whole. Those of evaluation
    ``sets`` are fitted on the training data; a mixture, which is no single store, has none.
    """
    score = task_of(config.objective).baselines
    if score is None:
        return []
    found: list[Baseline] = []
    for name, part in _held_out_parts(prepared):
        own = score(config, part)
        found += [one.of_part(name) for one in own] if name else own
    found = of_all_parts([one for one in found if one.part]) + found
    if [name for name, _ in prepared.components] == [""]:
        for name, part in sets:
            found += [one.of_set(name) for one in score(config, part)]
    return found


def evaluators(
    config: TrainConfig,
    prepared: Dataset,
    model: nn.Module,
    workdir: epath.Path | None,
    report: ClassReport | None = None,
    sets: Sets = (),
    scorers: Scorers | None = None,
) -> list[Evaluator]:
    """Held-out scores of a run, and samples where there is a workdir to write them to; ``report``
    gets the scores of single classes. ``scorers``: of a run whose rollouts share its rewards.

    In a mixture each component has all scores of its own, such as "eval/bleu_NAME", and so has each
    of the evaluation ``sets``, such as "eval/NAME/bleu". Raises UserError for probes of other data
    than images with classes.
    """
    task = task_of(config.objective)
    whole = EvaluatedRun(
        config, prepared, model, workdir, scorers={} if scorers is None else scorers
    )
    held_out = _held_out(task, config.objective)

    def part_of_run(name: str, part: Dataset) -> EvaluatedRun:
        return replace(whole, prepared=part, part=name, report=report and report.of_part(name))

    parts = {name: part_of_run(name, part) for name, part in _held_out_parts(prepared)}
    chosen = [held_out(whole, parts)]
    samples: list[tuple[str, Sample]] = []
    for name, run in parts.items():
        for evaluate in task.evaluators(run) if task.evaluators else ():
            chosen.append(_renamed(evaluate, partial(of_component, name=name)))
        if task.sample is not None:
            samples.append((name, task.sample(run)))
    for name, part in sets:
        run = part_of_run(name, part)
        own = task.evaluators(run) if task.evaluators else []
        of_this = partial(of_set, name=name)
        chosen += [_renamed(one, of_this) for one in (held_out(run, {"": run}), *own)]
    if config.evaluation.probes:
        chosen.append(probe_evaluator(config, prepared, model, sets))
    if workdir is not None and samples:
        chosen.append(_sampler(workdir, samples))
    return chosen


def _held_out_parts(prepared: Dataset) -> list[tuple[str, Dataset]]:
    parts = prepared.components
    return [(name, part) for name, part in parts if part.held_out_fingerprint is not None]


def _held_out(
    task: Task, objective: Any
) -> Callable[[EvaluatedRun, Mapping[str, EvaluatedRun]], Evaluator]:
    """Makes the evaluator of a run on all its data, whose components are given by name."""

    def compiled(snapshot: Snapshot) -> Callable[..., Any]:
        step = scored_prediction_step(objective, snapshot.functions)
        return compiled_together(compile_evaluation_step(step, snapshot.params, snapshot.mesh))

    step_of = once_per_shape(compiled)

    def held_out(run: EvaluatedRun, parts: Mapping[str, EvaluatedRun]) -> Evaluator:
        if task.held_out is not None:
            return task.held_out(run)
        readers = {name: task.reader(part) for name, part in parts.items()} if task.reader else {}
        read = {name: reader for name, reader in readers.items() if reader is not None}
        return held_out_evaluator(run.config, run.prepared, Readers(read, step_of))

    return held_out


def _renamed(evaluate: Evaluator, rename: Callable[[str], str]) -> Evaluator:
    """With other names of the scores."""
    return lambda snapshot: {rename(name): score for name, score in evaluate(snapshot).items()}


def _sampler(workdir: epath.Path, samples: Sequence[tuple[str, Sample]]) -> Evaluator:
    """Writes the samples of all components to one file at each evaluation."""

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        found = [(name, sample(snapshot)) for name, sample in samples]
        if jax.process_index() == 0:
            text = "\n\n".join(f"{name}:\n\n{shown}" if name else shown for name, shown in found)
            write_side_file(workdir / "samples" / f"step_{snapshot.step:08d}.txt", text + "\n")
        return {}

    return evaluate
