"""Baselines of multiple choice."""

from __future__ import annotations

import numpy as np

from flax_transformers.data.pipeline.labelled_examples import choices_of
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.held_out import evenly_spread
from flax_transformers.training.config import TrainConfig


def choice_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """Chance, and the place that is most often right in the training data."""
    held_out = prepared.validation
    assert held_out is not None
    if held_out.label_kind != "choices":  # refused when the run begins
        return []
    scored = evenly_spread(held_out.num_documents, config.evaluation.max_examples)
    chance = float(np.mean(1 / choices_of(held_out)[scored]))
    usual = np.bincount(prepared.train.all_labels).argmax()
    accuracies = {
        "chance": chance,
        "most frequent place": float(np.mean(held_out.all_labels[scored] == usual)),
    }
    return [
        Baseline(name, "eval/accuracy", score, len(scored), "held-out questions")
        for name, score in accuracies.items()
    ]
