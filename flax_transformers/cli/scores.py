"""What looks at a run of any config, and what there is to beat: for ``train`` and ``evaluate``."""

from __future__ import annotations

import logging
from collections.abc import Callable

import flax.linen as nn
import jax
from etils import epath

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.images import PreparedImages
from flax_transformers.data.mixture import PreparedMixture
from flax_transformers.data.prepare import PreparedText
from flax_transformers.data.store import TokenStore
from flax_transformers.evaluation.baselines import Baseline, text_baselines
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
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot
from flax_transformers.training.workdir import write_text

SAMPLES = 6

log = logging.getLogger(__name__)


def baselines(config: TrainConfig, prepared: Dataset) -> list[Baseline]:
    """The guesses that a model of this config has to beat; none without held-out data."""
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
    """Held-out scores of a run; and samples, where there is a workdir to write them to."""
    chosen = [held_out_evaluator(config, prepared)]
    if isinstance(prepared, PreparedImages) and workdir is not None:
        return chosen + image_samplers(config, prepared, workdir)
    if isinstance(prepared, PreparedMixture):
        log.info("a mixture is scored by the objective's own metrics, for each part and for all")
    if not isinstance(prepared, PreparedText) or prepared.validation is None:
        return chosen
    if isinstance(config.objective, SequenceToSequence):
        if can_score():
            last = None if workdir is None else config.total_steps
            chosen.append(translation_evaluator(config, prepared, model, last))
        else:
            log.info("BLEU and chrF are left out, as sacrebleu is not installed")
    if isinstance(config.objective, SequenceClassification):
        chosen.append(classification_evaluator(config, prepared))
    elif isinstance(config.objective, TokenClassification):
        chosen.append(entity_evaluator(config, prepared))
    elif isinstance(config.objective, QuestionAnswering):
        chosen.append(question_evaluator(config, prepared, workdir))
    if workdir is None:
        return chosen
    if isinstance(config.objective, Masking):
        chosen.append(_sampler(workdir, _gaps_filled(prepared, prepared.validation)))
    elif isinstance(config.objective, CausalLM | SequenceLoss):
        chosen.append(_sampler(workdir, _texts_written(config, prepared, model)))
    return chosen


def _sampler(workdir: epath.Path, sample: Callable[[Snapshot], str]) -> Evaluator:
    """Writes what ``sample`` shows of the model to a file for each evaluation."""

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        text = sample(snapshot)
        if jax.process_index() == 0:
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
