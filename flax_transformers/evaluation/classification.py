"""Scores and baselines of classifiers and of regression."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from flax_transformers.data.images.dataset import PreparedImages
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import Baseline, majority_class
from flax_transformers.evaluation.class_report import (
    ClassReport,
    class_scores,
    confusion_matrix,
    matthews,
    occurring,
)
from flax_transformers.evaluation.held_out import Reader, evenly_spread
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig

log = logging.getLogger(__name__)


def classification_reader(
    prepared: PreparedText | PreparedImages, report: ClassReport | None = None
) -> Reader:
    """A reader of predictions: ``{"eval/macro_f1", "eval/matthews"}`` for classes (the objective
    itself reports accuracy), of two classes also ``"eval/f1"`` of the second, as in GLUE;
    ``{"eval/pearson", "eval/spearman"}`` for regression. Classes go to the ``report``, if any."""
    if len(prepared.label_names) == 2:
        log.info("eval/f1 is the F1 of the class %r", prepared.label_names[1])

    def read(_: Snapshot, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, float]:
        kept = [(batch["predicted"], batch["labels"]) for batch in batches]
        if not kept:
            return {}
        predicted, labels = map(np.concatenate, zip(*kept, strict=True))
        if prepared.label_names:
            return _class_scores(predicted, labels, prepared.label_names, report)
        from scipy.stats import rankdata  # slow to import

        return {
            "eval/pearson": pearson(predicted, labels),
            "eval/spearman": pearson(rankdata(predicted), rankdata(labels)),
        }

    return read


def _class_scores(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], report: ClassReport | None
) -> dict[str, float]:
    matrix = confusion_matrix(predicted, labels, len(names))
    if report is not None:
        report.write(matrix, names)
    f1 = class_scores(matrix)["f1"]
    macro_f1 = float(f1[occurring(matrix)].mean())
    found = {"eval/macro_f1": macro_f1, "eval/matthews": matthews(matrix)}
    return found | ({"eval/f1": float(f1[1])} if len(names) == 2 else {})


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two arrays [n]; 0 if one of them is constant."""
    a, b = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (a, b))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def classification_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The majority class of the training texts; for numbers, the squared error of their mean."""
    held_out = prepared.validation
    assert held_out is not None and isinstance(config.objective, SequenceClassification)
    numeric = config.objective.loss == "mse"
    if held_out.label_kind != ("numbers" if numeric else "classes"):  # refused when the run begins
        return []
    train, truth = prepared.train.all_labels, held_out.all_labels
    if not numeric:
        return [majority_class(config, train, truth, "held-out texts")]
    truth = truth[evenly_spread(len(truth), config.evaluation.max_examples)]
    error = float(np.mean((truth - train.mean()) ** 2))
    name = "mean of the training numbers"
    return [Baseline(name, "eval/loss", error, len(truth), "held-out texts", unit="")]


def image_baselines(config: TrainConfig, prepared: PreparedImages) -> list[Baseline]:
    """The majority class of the training images."""
    assert prepared.validation is not None
    labels = prepared.train.labels, prepared.validation.labels
    return [majority_class(config, *labels, "held-out images")]
