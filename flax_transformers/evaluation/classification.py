"""Scores of classes and of numbers, and the guesses that they have to beat."""

from __future__ import annotations

import numpy as np

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.held_out import evenly_spread
from flax_transformers.evaluation.predictions import held_out_predictions
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot


def classification_evaluator(config: TrainConfig, prepared: PreparedText) -> Evaluator:
    """``{"eval/macro_f1": ...}`` of classes, beside the accuracy that the objective counts; of
    numbers ``{"eval/pearson": ..., "eval/spearman": ...}``."""
    predictions = held_out_predictions(config, prepared)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        batches = list(predictions(snapshot))
        if not batches:
            return {}
        predicted, labels = (
            np.concatenate([batch[name] for batch in batches]) for name in ("predicted", "labels")
        )
        if prepared.label_names:
            classes = len(prepared.label_names)
            return {"eval/macro_f1": macro_f1(predicted, labels, classes)}
        return {
            "eval/pearson": pearson(predicted, labels),
            "eval/spearman": pearson(ranks(predicted), ranks(labels)),
        }

    return evaluate


def macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The mean over classes of F1, integers [n] each; classes that neither has do not count."""
    right = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * right[either > 0] / either[either > 0]).mean())


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two rows of numbers; 0 where one of them is always the same."""
    a, b = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (a, b))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each number in the order of all, float64 [n]; equal ones share their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def classification_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """What the most frequent class of the training texts scores on the held-out ones."""
    objective, held_out = config.objective, prepared.validation
    if not isinstance(objective, SequenceClassification) or held_out is None:
        return []
    wanted = "numbers" if objective.loss == "mse" else "classes"
    if held_out.label_kind != wanted:  # refused when the run begins
        return []
    if objective.loss == "mse":
        numbers, truth = (_labels(store) for store in (prepared.train, held_out))
        truth = truth[evenly_spread(len(truth), config.evaluation.max_examples)]
        error = float(np.mean((truth - numbers.mean()) ** 2))
        name, counted = "mean of the training numbers", (len(truth), "held-out texts")
        return [Baseline(name, "eval/loss", error, *counted, unit="")]
    classes, truth = (_labels(store) for store in (prepared.train, held_out))
    truth = truth[evenly_spread(len(truth), config.evaluation.max_examples)]
    share = float(np.mean(truth == np.bincount(classes).argmax()))
    return [Baseline("majority class", "eval/accuracy", share, len(truth), "held-out texts")]


def _labels(store: TokenStore) -> np.ndarray:
    return np.concatenate([store.labels(document) for document in range(store.num_documents)])
