"""What looks at a run of any config, and what there is to beat: for ``train`` and ``evaluate``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from etils import epath

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.images.dataset import PreparedImages
from flax_transformers.data.mixture import PreparedMixture
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.evaluation.baselines import Baseline, of_all_parts, text_baselines
from flax_transformers.evaluation.classification import (
    classification_baselines,
    classification_evaluator,
)
from flax_transformers.evaluation.held_out import held_out_evaluator
from flax_transformers.evaluation.images import image_baselines, image_samplers
from flax_transformers.evaluation.question_answering import question_baselines, question_evaluator
from flax_transformers.evaluation.samples import format_written, written_samples
from flax_transformers.evaluation.tagging import entity_evaluator, tagging_baselines
from flax_transformers.evaluation.translation import (
    can_score,
    translation_baselines,
    translation_evaluator,
)
from flax_transformers.generation.fill_mask import format_samples, held_out_samples
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.masked_lm import Masking
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.sequences import SequenceLoss
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.storage.workdir import write_text
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot

SAMPLES = 6

log = logging.getLogger(__name__)


def baselines(config: TrainConfig, prepared: Dataset) -> list[Baseline]:
    """The guesses that a model of this config has to beat; none without held-out data.

    Of a mixture those of each part, and what they come to for the whole.
    """
    if isinstance(prepared, PreparedMixture):
        found = [
            one.of_part(name) for name, part in _parts(prepared) for one in baselines(config, part)
        ]
        return of_all_parts(found) + found
    if isinstance(prepared, PreparedImages):
        return image_baselines(config, prepared)
    if not isinstance(prepared, PreparedText):
        return []
    return [
        *text_baselines(config, prepared),
        *translation_baselines(config, prepared),
        *classification_baselines(config, prepared),
        *tagging_baselines(config, prepared),
        *question_baselines(config, prepared),
    ]


def evaluators(
    config: TrainConfig, prepared: Dataset, model: nn.Module, workdir: epath.Path | None
) -> list[Evaluator]:
    """Held-out scores of a run; and samples, where there is a workdir to write them to.

    Of a mixture each part has all that it has by itself, "eval/bleu_NAME".
    """
    chosen = [held_out_evaluator(config, prepared)]
    if isinstance(prepared, PreparedImages) and workdir is not None:
        return chosen + image_samplers(config, prepared, workdir)
    parts: list[tuple[str, PreparedText]] = []
    if isinstance(prepared, PreparedMixture):
        parts = _parts(prepared)
    elif isinstance(prepared, PreparedText) and prepared.validation is not None:
        parts = [("", prepared)]
    for name, part in parts:
        own = _task_evaluators(config, part, model, workdir, name)
        chosen += [_of_part(evaluate, name) if name else evaluate for evaluate in own]
    samples = [(name, _sample(config, part, model)) for name, part in parts]
    shown = [(name, sample) for name, sample in samples if sample is not None]
    if workdir is not None and shown:
        chosen.append(_sampler(workdir, shown))
    return chosen


def _parts(prepared: PreparedMixture) -> list[tuple[str, PreparedText]]:
    """The parts of a mixture that hold something out."""
    parts = zip(prepared.names, prepared.parts, strict=True)
    return [(name, part) for name, part in parts if part.validation is not None]


def _of_part(evaluate: Evaluator, name: str) -> Evaluator:
    """Its scores under the name of a part of a mixture."""
    return lambda snapshot: {
        f"{metric}_{name}": score for metric, score in evaluate(snapshot).items()
    }


def _task_evaluators(
    config: TrainConfig,
    prepared: PreparedText,
    model: nn.Module,
    workdir: epath.Path | None,
    part: str,
) -> list[Evaluator]:
    """What a task is scored by, beside the objective's own metrics."""
    if isinstance(config.objective, SequenceToSequence):
        if can_score():
            last = None if workdir is None else config.total_steps
            return [translation_evaluator(config, prepared, model, last)]
        log.info("BLEU and chrF are left out, as sacrebleu is not installed")
    if isinstance(config.objective, SequenceClassification):
        return [classification_evaluator(config, prepared)]
    if isinstance(config.objective, TokenClassification):
        return [entity_evaluator(config, prepared)]
    if isinstance(config.objective, QuestionAnswering):
        folder = None if workdir is None else workdir / "predictions" / part
        return [question_evaluator(config, prepared, folder)]
    return []


def _sample(
    config: TrainConfig, prepared: PreparedText, model: nn.Module
) -> Callable[[Snapshot], str] | None:
    """What shows held-out text and what a model makes of it, for objectives that have that."""
    assert prepared.validation is not None
    if isinstance(config.objective, Masking):
        return _gaps_filled(prepared, prepared.validation)
    if isinstance(config.objective, CausalLM | SequenceLoss):
        return _texts_written(config, prepared, model)
    return None


def _sampler(
    workdir: epath.Path, samples: Sequence[tuple[str, Callable[[Snapshot], str]]]
) -> Evaluator:
    """Writes what ``samples`` show of the model to a file for each evaluation, under the names of
    a mixture's parts."""

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        found = [(name, sample(snapshot)) for name, sample in samples]
        if jax.process_index() == 0:
            text = "\n\n".join(f"{name}:\n\n{shown}" if name else shown for name, shown in found)
            write_text(workdir / "samples" / f"step_{snapshot.step:08d}.txt", text + "\n")
        return {}

    return evaluate


def _gaps_filled(prepared: PreparedText, validation: TokenStore) -> Callable[[Snapshot], str]:
    """Held-out sentences with a gap, and what the model fills in."""
    return lambda snapshot: format_samples(
        held_out_samples(
            snapshot.functions,
            snapshot.params,
            prepared.tokenizer,
            validation,
            count=SAMPLES,
            max_length=snapshot.phase.sequence_length,
        )
    )


def _texts_written(
    config: TrainConfig, prepared: PreparedText, model: nn.Module
) -> Callable[[Snapshot], str]:
    """Held-out texts, and how the model goes on with them or answers them."""
    return lambda snapshot: format_written(
        written_samples(config, prepared, model, snapshot.params, SAMPLES)
    )
