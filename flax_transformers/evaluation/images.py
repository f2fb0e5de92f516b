"""What looks at a run on images, and what it has to beat."""

from __future__ import annotations

import numpy as np
from etils import epath

from flax_transformers.data.images.dataset import PreparedImages
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.held_out import evenly_spread
from flax_transformers.evaluation.reconstructions import (
    reconstruction_baselines,
    reconstruction_evaluator,
)
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator


def image_baselines(config: TrainConfig, prepared: PreparedImages) -> list[Baseline]:
    """The guesses that a run of ``config`` has to beat; none where nothing is held out."""
    if prepared.validation is None:
        return []
    if isinstance(config.objective, MaskedImage):
        return reconstruction_baselines(config, prepared)
    if not isinstance(config.objective, ImageClassification):
        return []
    held_out = prepared.validation.labels
    held_out = held_out[evenly_spread(len(held_out), config.evaluation.max_examples)]
    commonest = np.bincount(prepared.train.labels).argmax()
    score = float((held_out == commonest).mean())
    counted = len(held_out), "held-out images"
    return [Baseline("the commonest class", "eval/accuracy", score, *counted)]


def image_samplers(
    config: TrainConfig, prepared: PreparedImages, workdir: epath.Path
) -> list[Evaluator]:
    """What writes pictures while a run goes on."""
    if isinstance(config.objective, MaskedImage) and prepared.validation is not None:
        return [reconstruction_evaluator(config, prepared, workdir)]
    return []
