"""``flax-transformers predict``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flax_transformers.cli.parsing import Architecture, Flag, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.ranges import EXAMPLES

if TYPE_CHECKING:
    from flax_transformers.data.inputs import InputRow, Inputs
    from flax_transformers.data.sources.labelled import ChoiceSource
    from flax_transformers.evaluation.predict import ImageFiles
    from flax_transformers.runtime import Described, Placed

log = logging.getLogger(__name__)
_MAX_LENGTH = 8192
"""Largest number of tokens of a text if the model has no limit."""
_QUESTION_LENGTH = 384
"""Length of the windows of a text that is searched for answers (BERT on SQuAD)."""


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
        from flax_transformers.parallel.watchdog import watchdog
        from flax_transformers.storage.workdir import write_text

        if not (given := Path(self.input).expanduser()).exists():
            raise UserError(f"there is no file or folder {given}; give --input a file of rows")
        placed = override(runtime.Placed(), overrides)
        runtime.start(None)
        watchdog.start(placed.limits)
        with watchdog.phase("restore"):
            described = runtime.described_model(self._path(), self.architecture)
        found = _lines(self, described, placed)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        if jax.process_index() == 0 and self.output:
            write_text(epath.Path(self.output), text)
        elif jax.process_index() == 0:
            print(text, end="")
        return 0

    def _path(self) -> str:
        if self.step is None:
            return self.model
        if not (self.step == "best" or self.step.isdecimal()):
            raise UserError(f"--step is {self.step!r}; give the number of a step, or best")
        return f"{self.model.rstrip('/')}/checkpoints/{self.step}"


def _lines(command: Predict, described: Described, placed: Placed) -> list[dict[str, Any]]:
    """What the model predicts. Everything but its weights is checked before they are read."""
    from flax_transformers.evaluation.predict import (
        LABELLED,
        embedding_of_model,
        objective_of_model,
    )
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.models.config import ComputeConfig, VisionConfig

    config, place = described.model, described.place
    if command.score:
        return _scored(command, described, placed)
    if isinstance(config, VisionConfig):
        return _of_images(command, described, placed)
    if command.pool is not None:
        objective = embedding_of_model(config, described.tokenizer, command.pool, place)
        return _of_texts(command, described, placed, objective)
    of_run = _of_run(described, "objective")
    of_run = of_run if isinstance(of_run, LABELLED) else None
    if command.label_field is not None:
        raise UserError("--label-field is for --score with --choices-field; leave it out")
    model: Any = build_model(config, ComputeConfig())
    if "decoder_input_ids" in model.inputs and hasattr(model, "unembed"):
        return _written(command, described, placed)
    return _of_texts(command, described, placed, of_run or objective_of_model(config, place))


def _of_run(described: Described, name: str) -> Any:
    """A field of the config of the model's run; None for weights that belong to no run."""
    from flax_transformers.checkpointing.step_directories import SavedStep
    from flax_transformers.restore import saved_part

    return saved_part(described.source, name) if isinstance(described.source, SavedStep) else None


def _inputs(command: Predict, described: Described, objective: Any) -> Inputs:
    """The file of rows, with the fields of the run's training data where none are given."""
    from flax_transformers.data.inputs import Inputs
    from flax_transformers.objectives.question_answering import QuestionAnswering
    from flax_transformers.objectives.token_classification import TokenClassification

    data = _of_run(described, "data")
    parts = getattr(data, "components", None)
    source: Any = getattr(parts[0] if parts else data, "source", None)
    choices = _choice_source(command, source, objective)
    if choices is not None:
        answers = command.label_field is not None
        return Inputs(command.input, choices.fields, choices=choices, answers=answers)
    questions = isinstance(objective, QuestionAnswering)
    if questions:
        fields = [command.text_field or "question", command.second_field or "context"]
    else:
        first = getattr(source, "source_field", None) or getattr(source, "text_field", None)
        second = getattr(source, "second_field", None)
        second = None if command.pool is not None or command.score else second
        fields = [command.text_field or first or "text"]
        fields += [one for one in (command.second_field or second,) if one]
    words = isinstance(objective, TokenClassification)
    column = getattr(source, "word_column", 1)
    return Inputs(command.input, tuple(fields), words, column, questions)


def _choice_source(command: Predict, source: Any, objective: Any) -> ChoiceSource | None:
    """How rows with choices are read; None for rows without."""
    from flax_transformers.data.sources.labelled import ChoiceSource
    from flax_transformers.multiple_choice.objective import MultipleChoice

    if not (isinstance(objective, MultipleChoice) or (command.score and command.choices_field)):
        return None
    found = source if isinstance(source, ChoiceSource) else ChoiceSource()
    named = command.choices_field
    return replace(
        found,
        text_field=command.text_field or found.text_field,
        question_field=command.second_field or found.question_field,
        choice_fields=tuple(named.split(",")) if named else found.choice_fields,
        label_field=command.label_field or found.label_field,
    )


def _scored(command: Predict, described: Described, placed: Placed) -> list[dict[str, Any]]:
    """What a language model, causal or masked, says of each text."""
    from flax_transformers.evaluation.scoring.likelihood import likelihood_of_model
    from flax_transformers.models.config import TextConfig

    config, tokenizer, place = described.model, described.tokenizer, described.place
    if command.pool is not None:
        raise UserError("--score and --pool exclude each other; give one of them")
    if tokenizer is None or not isinstance(config, TextConfig):
        raise UserError(f"{place} has no tokenizer; give --score with a model of text")
    if command.label_field is not None and command.choices_field is None:
        raise UserError("--label-field needs --choices-field; give both, or neither")
    if command.choices_field is not None:
        return _of_choices(command, described, placed)
    return _of_texts(command, described, placed, likelihood_of_model(config, tokenizer, place))


def _of_texts(
    command: Predict, described: Described, placed: Placed, objective: Any
) -> list[dict[str, Any]]:
    from flax_transformers import runtime
    from flax_transformers.data.tokenizers.fitting import fitted_vocabulary
    from flax_transformers.evaluation.predict import LABELLED, lines, predictions, text_examples
    from flax_transformers.evaluation.scoring.likelihood import score_lines, scored_texts
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.models.config import ComputeConfig, TextConfig
    from flax_transformers.multiple_choice.objective import MultipleChoice
    from flax_transformers.objectives.question_answering import QuestionAnswering
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.parallel.watchdog import watchdog
    from flax_transformers.training.step import check_fits

    config, tokenizer = described.model, described.tokenizer
    if tokenizer is None or not isinstance(config, TextConfig):
        raise UserError(f"{described.place} has no tokenizer; give a model of text")
    check_fits(objective, build_model(config, ComputeConfig()))
    phases = _of_run(described, "phases")
    limit = config.max_positions or _MAX_LENGTH
    if phases is not None and isinstance(objective, LABELLED):
        limit = min(limit, phases[-1].sequence_length)
    elif isinstance(objective, QuestionAnswering):
        limit = min(limit, _QUESTION_LENGTH)
        objective = replace(
            objective, max_question_length=min(objective.max_question_length, limit // 2)
        )
    size = config.vocab_size
    vocabulary = fitted_vocabulary(tokenizer.vocabulary, size, config.pad_id, size)
    if config.pad_id >= 0:
        vocabulary = replace(vocabulary, pad_id=config.pad_id)
    with watchdog.phase("prepare"):
        rows = _inputs(command, described, objective).rows()
        if isinstance(objective, MultipleChoice):
            objective = replace(objective, choices=max(len(row.choices) for row in rows))
        examples = text_examples(rows, tokenizer, config, objective, limit)
        if command.score:
            examples = scored_texts(examples, objective, limit)
    with watchdog.phase("restore"):
        restored = runtime.restored_model(described, make_mesh(placed.mesh), placed.compute)
    with watchdog.phase("evaluation"):
        found = predictions(examples, objective, restored, vocabulary, limit, command.batch_size)
    if command.score:
        return score_lines(rows, examples, found)
    return lines(objective, config, rows, examples, found, tokenizer)


def _of_choices(command: Predict, described: Described, placed: Placed) -> list[dict[str, Any]]:
    """What a language model says of each choice of each row."""
    from flax_transformers import runtime
    from flax_transformers.evaluation.predict import predictions
    from flax_transformers.evaluation.scoring.continuations import (
        ContinuationLikelihood,
        Requests,
        accuracies,
        check_requests,
        choice_lines,
        choice_requests,
    )
    from flax_transformers.generation.prompts import noted_frame, require_known
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.models.config import ComputeConfig, TextConfig
    from flax_transformers.objectives.base import Frame
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.parallel.watchdog import watchdog
    from flax_transformers.training.step import check_fits

    tokenizer, config = described.tokenizer, described.model
    assert tokenizer is not None and isinstance(config, TextConfig)
    objective: Any = ContinuationLikelihood()
    check_fits(objective, build_model(config, ComputeConfig()))
    limit = config.max_positions or _MAX_LENGTH
    with watchdog.phase("prepare"):
        rows = _inputs(command, described, objective).rows()
        before = (noted_frame(tokenizer) or Frame()).before
        requests = choice_requests(rows, tokenizer, before)
        check_requests(requests, limit, "choice")
        ids = {token for one in requests for token in (*one.context, *one.continuation)}
        require_known(tokenizer, ids, config.vocab_size, "input")
    with watchdog.phase("restore"):
        restored = runtime.restored_model(described, make_mesh(placed.mesh), placed.compute)
    vocabulary = replace(tokenizer.vocabulary, pad_id=max(config.pad_id, 0))
    with watchdog.phase("evaluation"):
        examples, size = Requests(requests), command.batch_size
        found = predictions(examples, objective, restored, vocabulary, limit, size)
    lines = choice_lines(rows, found)
    for name, score in accuracies(lines).items():
        log.info("%s %.4f of %d rows", name.replace("_", " "), score, len(rows))
    return lines


def _written(command: Predict, described: Described, placed: Placed) -> list[dict[str, Any]]:
    """The texts that an encoder-decoder answers with, as ``generate`` without sampling."""
    import jax

    from flax_transformers.cli.generate import Generate
    from flax_transformers.generation.program import arranged
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.parallel.watchdog import watchdog
    from flax_transformers.pretrained import load_pretrained

    rows = _inputs(command, described, None).rows()
    generate = Generate(described.place, batch_size=command.batch_size, temperature=0.0)
    work = generate.work_on(described.source, described.model, ())
    encoded = work.checked([_only_text(row) for row in rows])
    mesh = make_mesh(placed.mesh)
    with watchdog.phase("restore"):
        model, params = load_pretrained(
            described.source, architecture=described.architecture, compute=placed.compute, mesh=mesh
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


def _only_text(row: InputRow) -> str:
    return row.document.text[0]


def _of_images(command: Predict, described: Described, placed: Placed) -> list[dict[str, Any]]:
    from flax_transformers import runtime
    from flax_transformers.evaluation.features.embedding import encoder_of
    from flax_transformers.evaluation.predict import lines, predictions
    from flax_transformers.huggingface.family import build_model
    from flax_transformers.models.config import ComputeConfig
    from flax_transformers.objectives.base import Vocabulary
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.parallel.watchdog import watchdog
    from flax_transformers.training.step import check_fits

    examples, objective = _images(command, described)
    check_fits(objective, build_model(described.model, ComputeConfig()))
    with watchdog.phase("restore"):
        restored = runtime.restored_model(described, make_mesh(placed.mesh), placed.compute)
    if command.pool is not None:
        restored = replace(restored, model=encoder_of(restored.model))
    with watchdog.phase("evaluation"):
        no_text, size = Vocabulary(size=1, pad_id=0), command.batch_size
        found = predictions(examples, objective, restored, no_text, examples.side, size)
    said = lines(objective, described.model, (), examples, found, None)
    files = map(str, examples.files)
    return [{"file": file, **line} for file, line in zip(files, said, strict=True)]


def _images(command: Predict, described: Described) -> tuple[ImageFiles, Any]:
    """The image files, and the objective whose preprocessing and head they get."""
    from flax_transformers.evaluation.features.embedding import image_embedding
    from flax_transformers.evaluation.predict import (
        LABELLED,
        ImageFiles,
        image_files_of,
        published_preprocessing,
    )
    from flax_transformers.models.config import VisionConfig
    from flax_transformers.objectives.images import PixelInput

    config = described.model
    assert isinstance(config, VisionConfig)
    files = image_files_of(Path(command.input).expanduser())
    data, objective = _of_run(described, "data"), _of_run(described, "objective")
    side, channels = config.image_shape[0], config.num_channels
    if isinstance(objective, PixelInput) and hasattr(data, "crop_fraction"):
        side, channels = _of_run(described, "phases")[-1].sequence_length, data.channels
        crop = data.crop_fraction
    else:
        objective, crop = published_preprocessing(Path(described.place), config)
    if command.pool is not None:
        objective = image_embedding(config, objective, command.pool)
    elif not isinstance(objective, LABELLED):
        raise UserError(
            f"{described.place} holds a {config.architecture}, which has no head for labels; use "
            "--pool for embeddings, or give a fine-tuned model"
        )
    return ImageFiles(files, side, channels, crop), objective
