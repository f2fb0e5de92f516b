"""What a model's head says of new texts and images, one JSON object for each.

Rows are padded to the bucket of their own length, whatever rows they share a batch with, so that
predictions do not depend on the batch size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from flax_transformers.data.images.augmentation import centre_crop
from flax_transformers.data.images.decode import UnreadableImage, decode_image, resize
from flax_transformers.data.images.files import image_files
from flax_transformers.data.inputs import InputRow, Inputs
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.data.tokenizers.encoding import encode_documents
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.features.embedding import ImageEmbedding
from flax_transformers.evaluation.predictions import (
    Predicts,
    predicted,
    prediction_step,
    rows_of_host,
)
from flax_transformers.evaluation.question_answering import best_answers
from flax_transformers.evaluation.scoring.choices import choice_line
from flax_transformers.evaluation.tagging import tagged_words
from flax_transformers.generation.buckets import bucket
from flax_transformers.generation.prompts import noted_frame, require_known
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.tensor_files import read_json
from flax_transformers.models.config import (
    ComputeConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    Frame,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.labelled import Framing
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.rows import framing_ids, padded_tokens
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.restore import RestoredModel
from flax_transformers.training.step import model_functions

LABELLED = (
    SequenceClassification,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    ImageClassification,
)
"""Objectives whose heads are predicted with."""
_SHORTEST = 16
"""Smallest bucket of lengths."""
_FRAMINGS: tuple[tuple[str, Framing], ...] = (
    ("Roberta", "roberta"), ("XLMRoberta", "roberta"), ("Bart", "roberta"), ("MBart", "roberta"),
    ("T5", "t5"), ("MT5", "t5"), ("UMT5", "t5"), ("GPT2", "gpt2"), ("Llama", "llama"),
    ("Mistral", "llama"), ("Mixtral", "llama"), ("Gemma", "llama"),
)  # fmt: skip

Line = dict[str, Any]


@dataclass(frozen=True)
class TextEmbedding:
    """The ``predict`` of a vector for each text: the mean of its tokens, or the first one."""

    needs: ClassVar[ModelNeeds] = ModelNeeds((), ("input_ids",))

    frame: Frame
    pool: Literal["mean", "cls"]
    normalize: bool = False
    encodes: bool = False
    """Whether the model is an encoder-decoder, whose encoder is used."""

    def prepare(
        self, example: Arrays, rng: np.random.Generator, vocab: Vocabulary, sequence_length: int
    ) -> Arrays:
        """The frame around ``tokens``, which are cut to fit: arrays int32 [T]."""
        before, after = self.frame.before, self.frame.after
        kept = example["tokens"][: sequence_length - len(before) - len(after)]
        ids = np.concatenate([before, kept, after]).astype(np.int32)
        return padded_tokens(ids, sequence_length, vocab)

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``embedding`` float32 [B, D]."""
        import jax.numpy as jnp

        from flax_transformers.models.heads import mean_of_tokens

        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.encodes:
            hidden_BTD = model.head("encode", params, {}, ids, mask)
        else:
            hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        hidden_BTD = hidden_BTD.astype(jnp.float32)
        vector_BD = mean_of_tokens(hidden_BTD, mask) if self.pool == "mean" else hidden_BTD[:, 0]
        if self.normalize:
            length_B1 = jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)
            vector_BD = vector_BD / jnp.maximum(length_B1, 1e-12)
        return {"embedding": vector_BD}


def objective_of_model(config: TransformerConfig, place: str) -> Any:
    """The objective for the head of a model that was not trained here.

    Raises UserError if it has no head for labels, tags, answers or choices.
    """
    model = build_model(config, ComputeConfig())
    found = (kind for start, kind in _FRAMINGS if config.architecture.startswith(start))
    framing: Framing = next(found, "bert")
    regression = config.problem_type == "regression" or config.num_labels == 1
    if hasattr(model, "answer_spans"):
        return QuestionAnswering(framing=framing)
    if hasattr(model, "tag"):
        return TokenClassification(framing=framing)
    if hasattr(model, "choose"):
        return MultipleChoice(framing=framing)
    if hasattr(model, "classify") and isinstance(config, TextConfig):
        loss: Literal["mse", "cross_entropy"] = "mse" if regression else "cross_entropy"
        return SequenceClassification(loss=loss, framing=framing)
    hint = "use flax-transformers generate" if config_writes(model) else "use --pool for embeddings"
    raise UserError(
        f"{place} holds a {config.architecture}, which has no head for labels, tags, answers or "
        f"translations; {hint}, or give a fine-tuned model"
    )


def config_writes(model: Any) -> bool:
    """Whether a model continues texts."""
    return hasattr(model, "unembed") and bool(getattr(model.config, "causal", False))


def embedding_of_model(
    config: TransformerConfig, tokenizer: Tokenizer | None, pool: Literal["mean", "cls"], place: str
) -> TextEmbedding:
    """What ``--pool`` computes. Raises UserError for a model that does not read text."""
    if tokenizer is None or not isinstance(config, TextConfig):
        raise UserError(f"{place} has no tokenizer; give --pool with a model of text")
    model = build_model(config, ComputeConfig())
    frame = noted_frame(tokenizer)
    if frame is None:
        cls_id, sep_id = framing_ids(tokenizer.vocabulary)
        frame = Frame((cls_id,), (sep_id,))
    normalize = bool(config.normalize_embeddings)
    return TextEmbedding(
        frame, pool, normalize, "decoder_input_ids" in getattr(model, "inputs", ())
    )


class EncodedRows:
    """Encoded documents in the place of a token store; their labels are placeholders."""

    directory, split, is_local = "the input", "rows", True

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
class _Texts(Examples):
    """One text in each example, ``tokens`` int32 [n]."""

    ids: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, rng: np.random.Generator) -> Arrays:
        return {"tokens": self.ids[index]}


def text_examples(
    rows: Sequence[InputRow], tokenizer: Tokenizer, config: TextConfig, objective: Any, length: int
) -> Examples:
    """The rows as examples of at most ``length`` tokens, as evaluation has them.

    Raises UserError for tokens that the model has no embedding for, and for a text without tokens.
    """
    chunks = encode_documents(enumerate(row.document for row in rows), tokenizer)
    encoded = [ids for chunk in chunks for _, ids in chunk]
    for number, texts in enumerate(encoded, 1):
        if not texts:
            raise UserError(f"row {number} has a text without tokens; fix it, or leave it out")
        for ids in texts:
            largest = ids[int(ids.argmax()) :][:1].tolist()
            require_known(tokenizer, largest, config.vocab_size, f"text of row {number}")
    if not hasattr(objective, "window_spec"):  # one text in each example
        return _Texts([ids for (ids,) in encoded])
    spec = objective.window_spec(length)
    store: Any = EncodedRows(encoded, spec.labels)
    return LabelledExamples(store, spec)


@dataclass(frozen=True)
class ImageFiles(Examples):
    """Image files as examples: ``image`` uint8 [side, side, channels].

    ``crop``: fraction of the shorter side in the centre crop; None: the whole image, resized.
    """

    files: Sequence[Path]
    side: int
    channels: int
    crop: float | None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, rng: np.random.Generator) -> Arrays:
        file = self.files[index]
        try:
            pixels = decode_image(file.read_bytes(), self.channels)
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{file} {error}; fix it, or leave it out") from error
        size = self.side, self.side
        image = resize(pixels, size) if self.crop is None else None
        image = centre_crop(pixels, self.side, self.crop or 1.0) if image is None else image
        return {"image": image, "label": np.array(0, np.int32)}


def batches_by_length(
    examples: Examples, objective: Any, vocabulary: Vocabulary, length: int, batch_size: int
) -> Iterator[Arrays]:
    """Batches of ``batch_size`` prepared rows, each batch of one bucket of lengths up to
    ``length``; the last of a bucket is filled with rows of zeros with ``example_id`` -1."""
    waiting: dict[int, list[Arrays]] = defaultdict(list)
    rng = np.random.default_rng(0)  # nothing in a row is random
    for number in range(len(examples)):
        row = objective.prepare(examples.read(number, rng), rng, vocabulary, length)
        size = length
        if "attention_mask" in row:
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
        batches = batches_by_length(examples, objective, vocabulary, length, batch_size)
        local = ({name: rows[hosts] for name, rows in batch.items()} for batch in batches)
        for batch in predicted(step, restored.params, local, mesh, batch_size):
            for row, number in enumerate(batch["example_id"].tolist()):
                found[number] = {name: values[row : row + 1] for name, values in batch.items()}
    return [found[number] for number in range(len(examples))]


def lines(
    objective: Any,
    config: TransformerConfig,
    rows: Sequence[InputRow],
    examples: Examples,
    found: Sequence[Arrays],
    tokenizer: Tokenizer | None,
) -> list[Line]:
    """A JSON object for each row, from what the model ``found`` for each example."""
    if isinstance(objective, TextEmbedding | ImageEmbedding):
        return [{"embedding": list(map(_short, row["embedding"][0]))} for row in found]
    if isinstance(objective, SequenceClassification) and objective.loss == "mse":
        return [{"value": _short(row["predicted"][0])} for row in found]
    if isinstance(objective, TokenClassification):
        assert isinstance(examples, LabelledExamples)
        return _tag_lines(rows, examples, found, names_of_labels(config))
    if isinstance(objective, QuestionAnswering):
        assert isinstance(examples, LabelledExamples) and tokenizer is not None
        documents: Callable[[int], Any] = lambda number: rows[number].document  # noqa: E731
        answers = best_answers(found, examples, objective, documents, tokenizer)
        return [_answer_line(*answers[number]) for number in range(len(rows))]
    if isinstance(objective, MultipleChoice):
        return [
            choice_line(one["logits"][0], row.choices) for row, one in zip(rows, found, strict=True)
        ]
    independent = config.problem_type == "multi_label_classification" or (
        isinstance(objective, ImageClassification) and objective.loss == "sigmoid"
    )
    names = names_of_labels(config)
    return [_label_line(row["logits"][0], names, independent) for row in found]


def names_of_labels(config: TransformerConfig) -> tuple[str, ...]:
    """The model's labels, named as transformers does where they have no names."""
    return config.label_names or tuple(f"LABEL_{n}" for n in range(config.num_labels))


def _short(value: Any) -> float:
    """A number with six digits, all that float32 has to say."""
    return float(f"{float(value):.6g}")


def _label_line(logits: np.ndarray, names: Sequence[str], independent: bool) -> Line:
    """``independent``: labels have a probability each (a sigmoid), and all above one half hold."""
    logits = logits.astype(np.float64)
    if independent:
        shares = 1 / (1 + np.exp(-logits))
    else:
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
    best = int(logits.argmax())
    line: Line = {"label": names[best], "probability": _short(shares[best])}
    if independent:
        held = [name for name, share in zip(names, shares, strict=True) if share >= 0.5]
        line = {"labels": held}
    return line | {"probabilities": dict(zip(names, map(_short, shares), strict=True))}


def _tag_lines(
    rows: Sequence[InputRow],
    examples: LabelledExamples,
    found: Sequence[Arrays],
    names: Sequence[str],
) -> list[Line]:
    tagged = tagged_words(found, examples)
    return [
        {
            "words": [
                {"word": word, "start": start, "end": end, "tag": names[tag]}
                for (word, start, end), tag in zip(row.words, tagged[number][0], strict=True)
            ]
        }
        for number, row in enumerate(rows)
    ]


def _answer_line(best: Sequence[Any], none: bool) -> Line:
    if none:
        return {"answer": "", "score": None, "start": None, "end": None}
    one = best[0]
    return {"answer": one.text, "score": _short(one.score), "start": one.start, "end": one.end}


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
    folder: Path, config: VisionConfig
) -> tuple[ImageClassification, float | None]:
    """The objective with the normalization of a folder's preprocessor_config.json, and the fraction
    of the centre crop, None for whole images; the transformers defaults without that file.

    Images are resized with the bicubic filter, whichever the file names.
    """
    file = folder / "preprocessor_config.json"
    given = read_json(file) if file.is_file() else {}
    size, crop_size = given.get("size"), given.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}
    crop_size = {"height": crop_size} if isinstance(crop_size, int) else crop_size or {}
    crop = None
    if given.get("do_center_crop") and size.get("shortest_edge") and crop_size.get("height"):
        crop = min(1.0, crop_size["height"] / size["shortest_edge"])
    half = [0.5] * config.num_channels
    normalizes = given.get("do_normalize", True)
    mean = given.get("image_mean", half) if normalizes else [0.0]
    std = given.get("image_std", half) if normalizes else [1.0]
    loss: Literal["sigmoid", "softmax"] = "softmax"
    if config.problem_type == "multi_label_classification":
        loss = "sigmoid"
    return ImageClassification(mean=tuple(mean), std=tuple(std), loss=loss), crop
