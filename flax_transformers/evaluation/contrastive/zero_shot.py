"""Zero-shot classification of images by texts of the classes (arXiv:2103.00020 §3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flax_transformers.data.images.dataset import ImageData, ImageExamples
from flax_transformers.data.images.image_text import ClassTexts, PreparedPairs
from flax_transformers.evaluation.contrastive.retrieval import recalls
from flax_transformers.evaluation.held_out import evenly_spread, scored_batches
from flax_transformers.evaluation.predictions import once_per_shape, predicted, rows_of_host
from flax_transformers.objectives.base import Batch, ModelFunctions, Params, Vocabulary
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.parallel.distributed import compiled_together
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import compile_evaluation_step

Rows = Iterator[dict[str, np.ndarray]]


def zero_shot_evaluator(config: TrainConfig, prepared: PreparedPairs) -> Evaluator:
    """A function of a snapshot: of each set of ``ImageTextData.zero_shot`` the accuracy,
    ``"eval/zero_shot_accuracy"``, and how often the image that is most similar to a text of a class
    is of that class, ``"eval/zero_shot_text_to_image_recall_at_1"``, with "_NAME" for a set NAME.

    The vector of a class is the mean of the embeddings of its templates.
    """
    objective = config.objective
    assert isinstance(objective, ImageTextContrastive)
    compiled = once_per_shape(
        lambda snapshot: [
            compiled_together(compile_evaluation_step(step, snapshot.params, snapshot.mesh))
            for step in _steps(objective, snapshot.functions)
        ]
    )

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        of_images, of_texts = compiled(snapshot)

        def run(step: Any, batches: Rows, name: str) -> np.ndarray:
            size = config.evaluation.batch_size
            found = predicted(step, snapshot.params, batches, snapshot.mesh, size)
            return np.concatenate([batch[name] for batch in found])

        rows = rows_of_host(snapshot.mesh, config.evaluation.batch_size)
        images, labels = _images(config, prepared, rows), _labels(config, prepared)
        image_NE = run(of_images, images, "image")
        scores: dict[str, float] = {}
        for texts in prepared.data.zero_shot:
            length = snapshot.phase.sequence_length
            text_TE = run(of_texts, _texts(config, prepared, texts, length, rows), "text")
            scores |= _scores(image_NE, labels, text_TE, texts)
        return scores

    return evaluate


def _steps(objective: ImageTextContrastive, model: ModelFunctions) -> tuple[Any, Any]:
    """``(params, batch)`` to embeddings of images, and of texts."""

    def image_step(params: Params, batch: Batch) -> dict[str, Any]:
        pixels = objective.normalized(batch["pixel_values"])
        image_BE = model.head("embed_image", params, {}, pixels, interpolate_pos_encoding=True)
        return {"image": image_BE, "example_id": batch["example_id"]}

    def text_step(params: Params, batch: Batch) -> dict[str, Any]:
        text_BE = model.head("embed_text", params, {}, batch["input_ids"])
        return {"text": text_BE, "example_id": batch["example_id"]}

    return image_step, text_step


def _labels(config: TrainConfig, prepared: PreparedPairs) -> np.ndarray:
    assert prepared.labelled is not None
    labels = prepared.labelled.labels
    return labels[evenly_spread(len(labels), config.evaluation.max_examples)]


def _images(config: TrainConfig, prepared: PreparedPairs, rows: np.ndarray) -> Rows:
    """Batches of this host's rows of the labelled images."""
    assert prepared.labelled is not None and isinstance(config.objective, ImageTextContrastive)
    data: ImageData = prepared.data.zero_shot_data or prepared.data
    side = config.objective.image_size
    examples = ImageExamples(prepared.labelled, ImageSpec(side), data, training=False)
    no_text = Vocabulary(size=1, pad_id=0)
    for batch in scored_batches(config, examples, ImageClassification(), no_text, side, rows):
        yield {name: batch[name] for name in ("pixel_values", "example_id")}


def _texts(
    config: TrainConfig, prepared: PreparedPairs, texts: ClassTexts, length: int, rows: np.ndarray
) -> Rows:
    """Batches of this host's rows of all texts, those of a class one after another."""
    assert isinstance(config.objective, ImageTextContrastive)
    every = [text for of_class in texts.all() for text in of_class]
    ids = np.stack(
        [
            config.objective.prepare_text(tokens, prepared.vocabulary, length)["input_ids"]
            for tokens in prepared.tokenizer.encode_batch(every)
        ]
    )
    for start in range(0, len(every), config.evaluation.batch_size):
        numbers = start + rows
        real = numbers < len(every)
        yield {
            "input_ids": ids[np.where(real, numbers, 0)],
            "example_id": np.where(real, numbers, -1),
        }


def _scores(
    image_NE: np.ndarray, labels: np.ndarray, text_TE: np.ndarray, texts: ClassTexts
) -> dict[str, float]:
    """See ``zero_shot_evaluator``."""
    templates, suffix = len(texts.templates), f"_{texts.name}" if texts.name else ""
    class_KE = text_TE.reshape(-1, templates, text_TE.shape[1]).mean(axis=1)
    class_KE = class_KE / np.linalg.norm(class_KE, axis=1, keepdims=True)
    accuracy = np.mean(np.argmax(image_NE @ class_KE.T, axis=1) == labels)
    class_T = np.repeat(np.arange(len(class_KE)), templates)
    name = "eval/zero_shot_text_to_image"
    found = recalls(name, text_TE, image_NE, class_T, labels, tops=(1,))
    found = {"eval/zero_shot_accuracy": float(accuracy), **found}
    return {f"{name}{suffix}": score for name, score in found.items()}
