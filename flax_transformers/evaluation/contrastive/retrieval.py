"""Retrieval among held-out pairs of images and texts, and what a guess scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from flax_transformers.data.base import Dataset
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.held_out import evenly_spread
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig

TOPS = (1, 5, 10)
_ROWS = 1024  # of similarities at once


def retrieval(snapshot: Snapshot, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, float]:
    """A reader of predictions: recall at 1, 5 and 10 in both directions, as
    ``"eval/image_to_text_recall_at_1"`` and ``"eval/text_to_image_recall_at_1"``.

    The candidates are all held-out images and all different held-out texts. Equal texts count as
    one, which belongs to several images.
    """
    every = list(batches)
    if not every:
        return {}
    image_NE, text_NE, ids = (
        np.concatenate([batch[name] for batch in every]) for name in ("image", "text", "input_ids")
    )
    _, first, text_of_image = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    text_UE, text_of_image = text_NE[first], text_of_image.reshape(-1)
    texts = np.arange(len(text_UE))
    return recalls("eval/image_to_text", image_NE, text_UE, text_of_image, texts) | (
        recalls("eval/text_to_image", text_UE, image_NE, texts, text_of_image)
    )


def recalls(
    name: str,
    query_QE: np.ndarray,
    candidate_CE: np.ndarray,
    class_Q: np.ndarray,
    class_C: np.ndarray,
    tops: Sequence[int] = TOPS,
) -> dict[str, float]:
    """``{"NAME_recall_at_TOP"}``: share of queries that have a candidate of their class among the
    most similar ``top``.

    Embeddings are float32 [n, E] and classes integers [n]. A candidate of another class that is as
    similar comes before.
    """
    ranks = np.concatenate(list(_ranks(query_QE, candidate_CE, class_Q, class_C)))
    return {f"{name}_recall_at_{top}": float(np.mean(ranks < top)) for top in tops}


def _ranks(
    query_QE: np.ndarray, candidate_CE: np.ndarray, class_Q: np.ndarray, class_C: np.ndarray
) -> Iterator[np.ndarray]:
    """How many candidates of other classes come before the best of its own, of each query."""
    for start in range(0, len(query_QE), _ROWS):
        rows = slice(start, start + _ROWS)
        similarity_QC = query_QE[rows] @ candidate_CE.T
        own_QC = class_Q[rows, None] == class_C[None]
        best_Q = np.where(own_QC, similarity_QC, -np.inf).max(axis=1)
        yield np.sum((similarity_QC >= best_Q[:, None]) & ~own_QC, axis=1)


def pair_baselines(config: TrainConfig, prepared: Dataset) -> list[Baseline]:
    """What the same logit for every pair of a batch scores: for the sigmoid loss the best one."""
    objective, spec = config.objective, config.objective.window_spec(1)
    assert isinstance(objective, ImageTextContrastive)
    examples, size = prepared.examples("validation", spec), config.evaluation.batch_size
    count = (
        0 if examples is None else len(evenly_spread(len(examples), config.evaluation.max_examples))
    )
    sizes = [min(size, count - start) for start in range(0, count, size)]
    if not sizes:
        return []
    loss = sum(rows * _guess(objective.loss, rows) for rows in sizes) / count
    things = "held-out pairs"
    return [
        Baseline("equal logits", "eval/loss", loss, count, things),
        Baseline("equal logits", "eval/accuracy", len(sizes) / count, count, things),
    ]


def _guess(loss: str, rows: int) -> float:
    """The loss of a pair among ``rows`` pairs."""
    if loss == "softmax" or rows == 1:
        return math.log(rows)
    return math.log(rows) - (rows - 1) * math.log1p(-1 / rows)
