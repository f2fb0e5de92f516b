"""``flax-transformers predict``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flax_transformers.cli.parsing import Architecture, Flag, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.ranges import EXAMPLES

if TYPE_CHECKING:
    from flax_transformers.data.pipeline.examples import Examples
    from flax_transformers.evaluation.prediction import heads
    from flax_transformers.evaluation.prediction.examples import ImageFiles
    from flax_transformers.objectives.base import Arrays, Vocabulary
    from flax_transformers.runtime import ModelOptions, StoredModel

_MAX_LENGTH = 8192
"""Largest number of tokens of a text if the model has no limit."""
_MAX_ANSWER = 512
"""Largest number of tokens of an answer if neither the run nor the model has a limit."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predict:
    """Predict labels, tags, answers, texts or embeddings for the rows of a file, as JSON lines.

    What is predicted depends on the model's head. --mesh.fsdp and --mesh.tensor shard the model,
    --compute.dtype and its neighbours set how it is computed.
    """

    model: Model
    input: Annotated[str, option("FILE")]
    """Rows with the fields of the training data (.jsonl, .csv, .parquet ...), or .txt with a text
    in each line; for images a folder, an image, or a .txt with a path in each line."""
    output: Annotated[str | None, option("FILE")] = None
    """Write the JSON lines to this file (default: print them)."""
    pool: Literal["mean", "cls"] | None = None
    """Give embeddings: the mean over the tokens of a text or the patches of an image, or the vector
    of its first token."""
    score: Flag = False
    """Give the log-likelihood of each text by a language model, or the pseudo-log-likelihood by a
    masked one, with perplexity and bits per byte; with --choices-field, those of the choices."""
    batch_size: Annotated[int, number("--batch-size", EXAMPLES)] = 32
    """Number of rows that are computed at once."""
    step: Annotated[str | None, option("STEP")] = None
    """A step of the run, or "best" (default: the newest)."""
    text_field: Annotated[str | None, option("NAME")] = None
    """Field of the text (default: that of the run's training data, or "text")."""
    second_field: Annotated[str | None, option("NAME")] = None
    """Field of the second text, for models of two; of questions about a text."""
    choices_field: Annotated[str | None, option("NAME[,NAME...]")] = None
    """Field with the list of choices, or the fields of the choices (default: those of the run's
    training data, or "choices")."""
    label_field: Annotated[str | None, option("NAME")] = None
    """Field of the right choice: with --score, say which rows are right, and the accuracy."""
    architecture: Architecture = None

    def run(self, overrides: Sequence[str]) -> int:
        import jax
        from etils import epath

        from flax_transformers import runtime
        from flax_transformers.monitoring.metrics import json_text
        from flax_transformers.storage.workdir import check_file, write_text

        if not (given := Path(self.input).expanduser()).exists():
            raise UserError(f"there is no file or folder {given}; give --input a file of rows")
        options = override(runtime.ModelOptions(), overrides)
        runtime.start(None)
        if self.output:  # before predictions, which can take hours
            check_file(epath.Path(self.output).expanduser())
        watchdog.start(options.limits)
        with watchdog.phase("restore"):
            stored = runtime.stored_model(self._path(), self.architecture)
        found = _lines(self, stored, options)
        text = "".join(json_text(line, ensure_ascii=False) + "\n" for line in found)
        if jax.process_index() != 0:
            return 0
        if not self.output:
            print(text, end="")
            return 0
        try:
            write_text(epath.Path(self.output).expanduser(), text)
        except UserError:
            print(text, end="")  # so that they are not lost
            raise
        return 0

    def _path(self) -> str:
        if self.step is None:
            return self.model
        if not (self.step == "best" or self.step.isdecimal()):
            raise UserError(f"--step is {self.step!r}; give the number of a step, or best")
        return f"{self.model.rstrip('/')}/checkpoints/{self.step}"


def _lines(command: Predict, stored: StoredModel, options: ModelOptions) -> list[dict[str, Any]]:
    """What the model predicts. Everything but its weights is checked before they are read."""
    from flax_transformers import runtime
    from flax_transformers.evaluation.prediction import heads
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.huggingface.sentence_transformers import vector_length_is_one
    from flax_transformers.models.config import TextConfig, VisionConfig

    config, tokenizer, place = stored.model, stored.tokenizer, stored.place
    if command.score and command.pool is not None:
        raise UserError("--score and --pool exclude each other; give one of them")
    if isinstance(config, VisionConfig) and not command.score:
        return _of_images(command, stored, options)
    if tokenizer is None or not isinstance(config, TextConfig):
        option = "--score" if command.score else "--pool" if command.pool else "--input"
        raise UserError(f"{place} has no tokenizer; give {option} with a model of text")
    if command.label_field is not None and not command.score:
        raise UserError("--label-field is for --score with --choices-field; leave it out")
    if command.label_field is not None and command.choices_field is None:
        raise UserError("--label-field needs --choices-field; give both, or neither")
    if config.image_encoder is not None and command.pool is not None:
        raise UserError(
            f"{place} holds a {config.architecture}, which has no hidden states of texts alone; "
            "give --pool with --architecture of its text encoder, such as CLIPTextModel or "
            "SiglipTextModel, and a run as the folder that convert writes of it"
        )
    model: Any = build_model(config)
    head: heads.Head
    if command.score:
        head = heads.score_head(config, tokenizer, place, command.choices_field is not None)
    elif command.pool is not None:
        folder = stored.source if isinstance(stored.source, Path) else None
        normalize = vector_length_is_one(folder, config, command.pool)
        head = heads.embedding_head(config, tokenizer, command.pool, normalize)
    elif "decoder_input_ids" in model.inputs and hasattr(model, "unembed"):
        return _written(command, stored, options)
    else:
        trained = heads.head_of(stored.of_run("objective"))
        head = trained or heads.head_of_model(config, place, runtime.framing_of(stored))
    return _of_texts(command, stored, options, head)


def _row_file(command: Predict, stored: StoredModel) -> heads.RowFile:
    """The file of rows, and the source of the run's training data."""
    from flax_transformers.evaluation.prediction import heads

    data = stored.of_run("data")
    parts = getattr(data, "components", None)
    return heads.RowFile(
        command.input,
        getattr(parts[0] if parts else data, "source", None),
        command.text_field,
        command.second_field,
        tuple(command.choices_field.split(",")) if command.choices_field else (),
        command.label_field,
    )


def _of_texts(
    command: Predict, stored: StoredModel, options: ModelOptions, head: heads.Head
) -> list[dict[str, Any]]:
    from flax_transformers.data.tokenizers.fitting import fitted_vocabulary
    from flax_transformers.evaluation.prediction import heads
    from flax_transformers.evaluation.prediction.examples import TextRows
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.huggingface.sentence_transformers import sentence_length
    from flax_transformers.models.config import TextConfig
    from flax_transformers.training.step import check_fits

    config, tokenizer = stored.model, stored.tokenizer
    assert tokenizer is not None and isinstance(config, TextConfig)
    check_fits(head.objective, build_model(config))
    phases = stored.of_run("phases")
    trained = None if phases is None else phases[-1].sequence_length
    length = head.length(config.length_limit or _MAX_LENGTH, trained)
    if command.pool is not None:
        converted = not isinstance(stored.source, Path)
        folder = stored.files if converted else stored.source
        length = min(length, sentence_length(folder, converted=converted) or length)
    size = config.vocab_size
    vocabulary = fitted_vocabulary(tokenizer.vocabulary, size, config.pad_id, size)
    if config.pad_id >= 0:
        vocabulary = replace(vocabulary, pad_id=config.pad_id)
    with watchdog.phase("prepare"):
        texts = TextRows(head.inputs(_row_file(command, stored)).rows(), tokenizer, config)
        head = head.fitted(texts.rows, length)
        examples = head.examples(texts, length)
    found = _found(command, stored, options, head, examples, vocabulary, length)
    return head.lines(heads.Predicted(config, examples, found, texts))


def _found(
    command: Predict,
    stored: StoredModel,
    options: ModelOptions,
    head: heads.Head,
    examples: Examples,
    vocabulary: Vocabulary,
    length: int,
) -> list[Arrays]:
    """What the model predicts for examples of at most ``length`` tokens, or pixels of a side."""
    from flax_transformers import runtime
    from flax_transformers.evaluation.prediction.examples import predictions
    from flax_transformers.parallel.mesh import make_mesh

    with watchdog.phase("restore"):
        restored = runtime.restored_model(stored, make_mesh(options.mesh), options.compute)
    restored = replace(restored, model=head.model(restored.model))
    with watchdog.phase("evaluation"):
        size = command.batch_size
        return predictions(examples, head.objective, restored, vocabulary, length, size)


def _written(command: Predict, stored: StoredModel, options: ModelOptions) -> list[dict[str, Any]]:
    """The texts that an encoder-decoder answers with, as ``generate`` without sampling, from
    sources and to lengths as in training."""
    import jax

    from flax_transformers.cli.generate import Generate
    from flax_transformers.generation.program import arranged
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.pretrained import load_pretrained

    rows = _row_file(command, stored).texts().rows()
    longest, most = _lengths(stored)
    generate = Generate(
        stored.place, batch_size=command.batch_size, temperature=0.0, max_new_tokens=most
    )
    work = generate.work_on(stored.source, stored.model, ())
    encoded = work.encoded([row.document.text[0] for row in rows])
    log.info(
        "texts of more than %d tokens are truncated, %d of %d; answers have at most %d",
        longest, sum(len(ids) > longest for ids in encoded), len(encoded),
        most or work.settings.max_new_tokens or work.settings.max_length,
    )  # fmt: skip
    encoded = _cut(encoded, longest, stored)
    work.check(encoded)
    mesh = make_mesh(options.mesh)
    with watchdog.phase("restore"):
        model, params = load_pretrained(
            stored.source, architecture=stored.architecture, compute=options.compute, mesh=mesh
        )
    loaded = model, arranged(params)  # once for all batches
    alike: dict[int, list[int]] = {}  # rows by the length that they are padded to
    for index, ids in enumerate(encoded):
        alike.setdefault((len(ids) - 1).bit_length(), []).append(index)
    texts: dict[int, str] = {}
    with jax.set_mesh(mesh):
        for _, indices in sorted(alike.items()):
            for some in work.batches([encoded[index] for index in indices]):
                with watchdog.phase("evaluation"):
                    written = list(work.write(loaded, some, shown=False))
                texts |= dict(zip(indices[: len(some)], written, strict=True))
                indices = indices[len(some) :]
    return [{"text": texts[index]} for index in range(len(rows))]


def _lengths(stored: StoredModel) -> tuple[int, int | None]:
    """Maximum numbers of tokens of the sources and of the answers of an encoder-decoder: those of
    the run's training, else of the model. None: the model's generation settings say it."""
    config: Any = stored.model
    limit = None if config.positions == "none" else config.max_positions
    objective = stored.of_run("objective")
    if objective is None:
        settings = config.generation
        said = settings.max_new_tokens is not None or settings.max_length is not None
        return limit or _MAX_LENGTH, None if said else (limit or _MAX_ANSWER) - 1
    length = stored.of_run("phases")[-1].sequence_length
    # The first input of the decoder is no answer.
    return min(length, limit or length), max(1, objective.predictions(length) - 1)


def _cut(encoded: list[list[int]], longest: int, stored: StoredModel) -> list[list[int]]:
    """Sources without the end of texts that are too long; special tokens at their end stay."""
    from flax_transformers.generation.prompts import prompt_frame

    config: Any = stored.model
    assert stored.tokenizer is not None
    ends = max(1, len(prompt_frame(stored.tokenizer, config).after))
    return [
        ids if len(ids) <= longest else [*ids[: longest - ends], *ids[-ends:]] for ids in encoded
    ]


def _of_images(
    command: Predict, stored: StoredModel, options: ModelOptions
) -> list[dict[str, Any]]:
    from flax_transformers.evaluation.prediction import heads
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.objectives.base import Vocabulary
    from flax_transformers.training.step import check_fits

    examples, head = _images(command, stored)
    check_fits(head.objective, build_model(stored.model))
    no_text, height = Vocabulary(size=1, pad_id=0), examples.shape[0]
    found = _found(command, stored, options, head, examples, no_text, height)
    lines = head.lines(heads.Predicted(stored.model, examples, found))
    files = map(str, examples.files)
    return [{"file": file, **line} for file, line in zip(files, lines, strict=True)]


def _images(command: Predict, stored: StoredModel) -> tuple[ImageFiles, heads.Head]:
    """The image files, and the head whose preprocessing they get."""
    from flax_transformers.evaluation.features.embedding import image_embedding
    from flax_transformers.evaluation.prediction import heads
    from flax_transformers.evaluation.prediction.examples import (
        Crop,
        ImageFiles,
        image_files_of,
        published_preprocessing,
    )
    from flax_transformers.models.config import VisionConfig
    from flax_transformers.objectives.images import PixelInput

    config = stored.model
    assert isinstance(config, VisionConfig)
    files = image_files_of(Path(command.input).expanduser())
    data, objective = stored.of_run("data"), stored.of_run("objective")
    shape, channels = config.image_shape, config.num_channels
    if isinstance(objective, PixelInput) and hasattr(data, "crop_fraction"):
        side, channels = stored.of_run("phases")[-1].sequence_length, data.channels
        shape, crop = (side, side), Crop(data.crop_fraction, data.crop_fraction, keeps_ratio=True)
    else:
        objective, crop = published_preprocessing(stored.files, config)
    head = heads.head_of(objective)
    if isinstance(head, heads.Labels) and head.objective.loss == "sigmoid":
        head = replace(head, problem=config.problem_type)
    if command.pool is not None:
        head = heads.ImageEmbeddings(image_embedding(config, objective, command.pool))
    if head is None:
        raise UserError(
            f"{stored.place} holds a {config.architecture}, which has no head for labels; use "
            "--pool for embeddings, or give a fine-tuned model"
        )
    return ImageFiles(files, shape, channels, crop), head
