"""New texts and images as examples, without labels, and a model's predictions for them.

Rows are padded to the bucket of their own length, whatever rows they share a batch with, so that
predictions do not depend on the batch size.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from flax_transformers.data.images.decode import UnreadableImage, decode_image, resize
from flax_transformers.data.images.files import image_files
from flax_transformers.data.inputs import InputRow, Inputs
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.data.tokenizers.encoding import encode_documents
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.predictions import (
    Predicts,
    predicted,
    prediction_step,
    rows_of_host,
)
from flax_transformers.generation.buckets import bucket
from flax_transformers.generation.prompts import require_known
from flax_transformers.huggingface.family import family_of
from flax_transformers.huggingface.tensor_files import read_json
from flax_transformers.models.config import TextConfig, VisionConfig
from flax_transformers.objectives.base import Arrays, Vocabulary
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import IMAGENET_MEAN, IMAGENET_STD
from flax_transformers.objectives.labelled import LabelledSpec
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.restore import RestoredModel
from flax_transformers.storage.paths import is_there
from flax_transformers.training.step import model_functions

_SHORTEST = 16
"""Smallest bucket of lengths."""
_CROP_OF_TIMM = 0.875
"""What timm crops if a ``pretrained_cfg`` does not say it."""


class EncodedRows:
    """Encoded documents in the place of a token store; their labels are placeholders."""

    directory, split, is_local, read_threads = "the input", "rows", True, 0

    def __init__(self, documents: Sequence[Sequence[np.ndarray]], label_kind: str) -> None:
        texts = [text for document in documents for text in document]
        self.label_kind, self.num_documents = label_kind, len(documents)
        self._ids = np.concatenate([*texts, np.zeros(0, np.int32)]).astype(np.int32)
        self.sentence_ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._counts = [len(document) for document in documents]
        last = np.cumsum(self._counts)
        self.document_ends = np.append(0, self.sentence_ends)[last]

    def tokens(self, start: int, count: int) -> np.ndarray:
        return self._ids[start : start + count]

    def sentence_ends_within(self, start: int, stop: int) -> np.ndarray:
        """The ends in (start, stop]."""
        first, last = np.searchsorted(self.sentence_ends, [start, stop], side="right")
        return self.sentence_ends[first:last]

    def labels(self, document: int) -> np.ndarray:
        count = {"tags": self._counts[document], "spans": 0}.get(self.label_kind, 1)
        dtype = np.float32 if self.label_kind == "numbers" else np.int32
        return np.zeros(count, dtype)


@dataclass(frozen=True)
class SingleTexts(Examples):
    """One text in each example, ``tokens`` int32 [n]."""

    ids: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, rng: np.random.Generator) -> Arrays:
        return {"tokens": self.ids[index]}


@dataclass(frozen=True)
class TextRows:
    """Rows of texts, for a model of ``config`` and its tokenizer."""

    rows: Sequence[InputRow]
    tokenizer: Tokenizer
    config: TextConfig

    def encoded(self) -> list[list[np.ndarray]]:
        """The ids of the texts of each row, int32 [n] each, without special tokens.

        Raises UserError for tokens that the model has no embedding for, and for a text without
        tokens.
        """
        documents = enumerate(row.document for row in self.rows)
        chunks = encode_documents(documents, self.tokenizer)
        encoded = [ids for chunk in chunks for _, ids in chunk]
        for number, texts in enumerate(encoded, 1):
            if not texts:
                raise UserError(f"row {number} has a text without tokens; fix it, or leave it out")
            for ids in texts:
                largest = ids[int(ids.argmax()) :][:1].tolist()
                what = f"text of row {number}"
                require_known(self.tokenizer, largest, self.config.vocab_size, what)
        return encoded


def labelled_examples(texts: TextRows, spec: LabelledSpec) -> LabelledExamples:
    """The rows as examples of ``spec``, as evaluation has them."""
    store: Any = EncodedRows(texts.encoded(), spec.labels)
    return LabelledExamples(store, spec)


def text_examples(texts: TextRows) -> SingleTexts:
    """Rows of one text as examples."""
    return SingleTexts([ids for (ids,) in texts.encoded()])


@dataclass(frozen=True)
class Crop:
    """The centre part of an image that becomes the input of a model.

    ``height`` and ``width``: fractions of the image or, with ``keeps_ratio``, of its largest part
    whose sides have the ratio of the input's.
    """

    height: float = 1.0
    width: float = 1.0
    keeps_ratio: bool = False

    def of(self, pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The part of uint8 [height, width, C], resized to ``shape`` (height, width)."""
        height, width = map(float, pixels.shape[:2])
        if self.keeps_ratio:
            rows, columns = shape
            height, width = min(height, width * rows / columns), min(width, height * columns / rows)
        height, width = height * self.height, width * self.width
        left, top = (pixels.shape[1] - width) / 2, (pixels.shape[0] - height) / 2
        return resize(pixels, shape, (left, top, left + width, top + height))


@dataclass(frozen=True)
class ImageFiles(Examples):
    """Image files as examples: ``image`` uint8 [height, width, channels] of ``shape`` (height,
    width)."""

    files: Sequence[Path]
    shape: tuple[int, int]
    channels: int
    crop: Crop

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, rng: np.random.Generator) -> Arrays:
        file = self.files[index]
        try:
            pixels = decode_image(file.read_bytes(), self.channels)
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{file} {error}; fix it, or leave it out") from error
        return {"image": self.crop.of(pixels, self.shape), "label": np.array(0, np.int32)}


def image_files_of(path: Path) -> list[Path]:
    """The image files of a folder, in order, or in the lines of a .txt file, whose paths are
    relative to it; or one image. Raises UserError if there is none, or one is missing."""
    if path.is_dir():
        found = list(image_files(path))
    elif path.suffix.lower() == ".txt":
        rows = Inputs(str(path)).rows()
        found = [path.parent / str(row.document.text[0]).strip() for row in rows]
    else:
        found = [path]
    for file in found:
        if not file.is_file():
            raise UserError(f"there is no image {file}; check --input {path}")
    if not found:
        raise UserError(f"the folder {path} has no image files; give --input one with images")
    return found


def published_preprocessing(
    folder: epath.Path | Path, config: VisionConfig
) -> tuple[ImageClassification, Crop]:
    """The objective with the normalization of a folder's preprocessor_config.json, or of the image
    processor in its processor_config.json, and the crop.

    Without such a file they are those of the ``pretrained_cfg`` of timm's models, and for others
    the defaults of transformers: the whole image, and 0.5 as mean and deviation. Images are resized
    with the bicubic filter, whichever the file names.
    """
    given = stated_preprocessing(folder, config)
    half = [0.5] * config.num_channels
    normalizes = given.get("do_normalize", True)
    mean = np.ravel(given.get("image_mean", half) if normalizes else 0.0).tolist()
    std = np.ravel(given.get("image_std", half) if normalizes else 1.0).tolist()
    loss: Literal["sigmoid", "softmax"] = "softmax"
    if config.problem_type == "multi_label_classification":
        loss = "sigmoid"
    return ImageClassification(mean=tuple(mean), std=tuple(std), loss=loss), _crop(given)


def stated_preprocessing(folder: epath.Path | Path, config: VisionConfig) -> dict[str, Any]:
    """The image processor that a folder has a file of, or the ``pretrained_cfg`` of timm's models
    as one; empty without either."""
    file, both = folder / "preprocessor_config.json", folder / "processor_config.json"
    given: dict[str, Any] = read_json(file) if is_there(file) else {}
    if not given and is_there(both):
        given = read_json(both).get("image_processor") or {}
    return given or _of_timm(config)


def _of_timm(config: VisionConfig) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a model of timm as a preprocessor_config.json; empty for others."""
    family = family_of(config)
    if not family.timm_prefix:
        return {}
    kept = json.loads(dict(config.hub_fields).get("pretrained_cfg", "null"))
    given = kept or family.to_huggingface(config)["pretrained_cfg"]
    sides = ("height", "width") if given.get("crop_mode") == "squash" else ("shortest_edge",)
    return {
        "image_mean": given.get("mean", IMAGENET_MEAN),
        "image_std": given.get("std", IMAGENET_STD),
        "do_center_crop": True,
        "size": dict.fromkeys(sides, 1.0),
        "crop_size": {"height": given.get("crop_pct") or _CROP_OF_TIMM},
    }


def _crop(given: Mapping[str, Any]) -> Crop:
    """The crop that a preprocessor_config.json describes, if any."""
    size, cut = given.get("size"), given.get("crop_size")
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type"))
    if isinstance(size, int):  # the classes of DeiT mean both sides by it, others the shorter one
        both = {"height": size, "width": size}
        size = both if kind.startswith("DeiT") else {"shortest_edge": size}
    size, cut = size or {}, {"height": cut} if isinstance(cut, int) else cut or {}
    if not given.get("do_center_crop") or not cut.get("height"):
        return Crop()
    if shorter := size.get("shortest_edge"):
        part = min(1.0, cut["height"] / shorter)
        return Crop(part, part, keeps_ratio=True)
    if not size.get("height"):
        return Crop()
    height = min(1.0, cut["height"] / size["height"])
    width = min(1.0, cut.get("width", cut["height"]) / size.get("width", size["height"]))
    return Crop(height, width)


def batches_by_length(
    examples: Examples,
    objective: Predicts,
    vocabulary: Vocabulary,
    length: int,
    batch_size: int,
    one_length: bool = False,
) -> Iterator[Arrays]:
    """Batches of ``batch_size`` prepared rows, each batch of one bucket of lengths up to
    ``length``, or all of that length; the last of a bucket is filled with rows of zeros with
    ``example_id`` -1."""
    waiting: dict[int, list[Arrays]] = defaultdict(list)
    rng = np.random.default_rng(0)  # nothing in a row is random
    for number in range(len(examples)):
        row = objective.prepare(examples.read(number, rng), rng, vocabulary, length)
        size = length
        if "attention_mask" in row and not one_length:
            used = int(row["attention_mask"].sum(axis=-1).max())
            size = min(length, bucket(max(_SHORTEST, used)))
            row = {name: array[..., :size] if array.ndim else array for name, array in row.items()}
        rows = waiting[size]
        rows.append(row | {"example_id": np.array(number, np.int32)})
        if len(rows) == batch_size:
            watchdog.progress()
            yield stacked(waiting.pop(size))
    for rows in waiting.values():
        watchdog.progress()
        zeros = {name: np.zeros_like(array) for name, array in rows[0].items()}
        padding = zeros | {"example_id": np.array(-1, np.int32)}
        yield stacked(rows + [padding] * (batch_size - len(rows)))


def predictions(
    examples: Examples,
    objective: Predicts,
    restored: RestoredModel,
    vocabulary: Vocabulary,
    length: int,
    batch_size: int,
) -> list[Arrays]:
    """What ``objective.predict`` gives for each example, in order, as batches of one row."""
    functions, mesh = model_functions(restored.model), restored.mesh
    hosts = rows_of_host(mesh, batch_size, name="--batch-size")
    found: dict[int, Arrays] = {}
    with jax.set_mesh(mesh):
        step = prediction_step(objective, functions, restored.params, mesh)
        one = getattr(restored.model, "reads_padding", False)
        batches = batches_by_length(examples, objective, vocabulary, length, batch_size, one)
        local = ({name: rows[hosts] for name, rows in batch.items()} for batch in batches)
        for batch in predicted(step, restored.params, local, mesh, batch_size):
            for row, number in enumerate(batch["example_id"].tolist()):
                found[number] = {name: values[row : row + 1] for name, values in batch.items()}
    return [found[number] for number in range(len(examples))]
