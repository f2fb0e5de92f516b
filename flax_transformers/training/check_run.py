"""Checks, before the first step of a run, that its config, model and data agree.

`check_config` needs only the config; `check_run` also the prepared data. Both prepare a dummy
example and compare its arrays with the model's inputs, so that user-defined objectives and families
are checked too. `check_batch_values` compares the first real batch in the same way.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from flax_transformers import ranges
from flax_transformers.data.dataset import Dataset
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.models.config import (
    ComputeConfig,
    EncoderDecoderConfig,
    TextConfig,
    TransformerConfig,
)
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings
from flax_transformers.objectives.base import ModelNeeds, Vocabulary
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.dummy_batch import Arrays, dummy_row
from flax_transformers.training.step import check_fits

log = logging.getLogger(__name__)

LABEL_HEADS = frozenset({"classify", "tag"})
"""What an objective needs of a model if it learns the labels of the data."""


def check_config(config: TrainConfig, *, trains: bool = True) -> None:
    """Raises UserError for contradictions that show without the data; where nothing is trained,
    the optimizer does not matter."""
    _check_paths(config)
    if trains:
        _check_optimizer(config)
        if config.early_stopping.patience is not None and not config.evaluation.every_steps:
            raise UserError(
                "early_stopping.patience is set, but evaluation.every_steps is 0; set "
                "--evaluation.every-steps"
            )
    model = build_model(config.model, ComputeConfig())
    check_fits(config.objective, model)
    if trains:
        adapted_shapes(model, config.lora)
    _check_kind_of_data(config)
    _check_tokenizers(config)
    _check_outputs(config)
    for phase in config.phases:
        _check_image_size(config, phase)
        _check_row(config, phase, dummy_row(config, phase))


def check_run(config: TrainConfig, prepared: Dataset, *, new: bool = True) -> None:
    """Raises UserError unless the model and the objective fit the data. Reads no data.

    For a run that has a checkpoint (not ``new``), begin and end ids that differ from the
    tokenizer's are a warning.
    """
    check_fits(config.objective, build_model(config.model, ComputeConfig()))
    _check_outputs(config)
    stops_early = config.early_stopping.patience is not None
    if stops_early and not config.evaluation.sets and not _holds_out(config, prepared):
        raise UserError(
            f"early_stopping.patience is set, but the data in {prepared.directory} has no held-out "
            "examples; set --data.validation-fraction, or a validation_source in the config"
        )
    check_vocabulary(config, prepared.vocabulary, new=new)
    _check_classes(config, prepared)


def check_vocabulary(config: TrainConfig, vocabulary: Vocabulary, *, new: bool = True) -> None:
    """Raises UserError unless a text model and the objective fit the tokens of the data."""
    needs, model = config.objective.needs, config.model
    if not isinstance(model, TextConfig):
        return
    anywhere = needs.causal is True or model.ends_in_embedding
    _check_sizes(model, vocabulary, anywhere)
    if faults := list(_faults_of_ends(model, needs, vocabulary)):
        fault = ", and ".join(fault for fault, _, _ in faults)
        options = (f"--model.{field.replace('_', '-')} {token}" for _, field, token in faults)
        remedy = f"set {' '.join(options)}"
        if new:
            raise UserError(f"{fault}; {remedy}")
        log.warning("%s; %s for a new run", fault, remedy)
    for phase in config.phases:
        row = dummy_row(config, phase, vocabulary)
        _check_row(config, phase, row)
        _check_decoder_start(model, row)


def check_tokenizer(model: TransformerConfig, vocabulary: Vocabulary, place: str) -> None:
    """Warns where a model in ``place`` that writes text, and is not trained, begins or ends it with
    other ids than its tokenizer.

    The end ids of its generation settings go before those of its config.
    """
    settings: GenerationSettings = getattr(model, "generation", NO_SETTINGS)
    ends = settings.eos_ids or getattr(model, "eos_ids", ())
    for fault, field, token in _different_ends(model, vocabulary, ends):
        theirs = {"eos_ids": "eos_token_id", "bos_id": "bos_token_id"}[field]
        log.warning("%s: %s; set its %s to %s", place, fault, theirs, token)


def check_batch_values(
    config: TrainConfig, phase: AnyPhase, batch: Mapping[str, np.ndarray]
) -> None:
    """Raises UserError if a batch, as `TrainStream` gives it, has an id or a length that the model
    has no place for, or a number that is not finite."""
    _check_row(config, phase, batch, batched=True)


def check_label_names(model: TransformerConfig, prepared: Dataset) -> None:
    """Raises UserError if the data has a class that the model does not know, or the model calls
    its classes by other names, or in another order."""
    unseen = [name for name in prepared.label_names if name not in model.label_names]
    if unseen and set(model.label_names) & set(prepared.label_names):
        raise UserError(
            f"the data has the class {unseen[0]!r}, which the model does not know; its classes are "
            f"{', '.join(model.label_names[:20])}: correct the labels, or leave those rows out"
        )
    if not prepared.label_names:
        return
    for ours, theirs in itertools.zip_longest(model.label_names, prepared.label_names):
        if model.label_names and ours != theirs:
            fault = f"the class {theirs!r} where the model has {ours!r}"
            if theirs is None:
                fault = f"no class {ours!r}, which the model knows"
            raise UserError(
                f"the data has {fault}; give --data.source.label-names, in the model's order"
            )


_PATH_FIELDS = frozenset({"path", "target_path", "store", "init_from"})
"""Fields that name a file or a folder."""


def _check_paths(config: Any, where: str = "") -> None:
    """No file or folder has an empty name."""
    if isinstance(config, tuple):
        for item in config:
            _check_paths(item, where)
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            value, name = getattr(config, field.name), f"{where}{field.name}"
            if field.name in _PATH_FIELDS and value == "":
                raise UserError(f"{name} is empty; give the path, or leave it out")
            _check_paths(value, f"{name}.")


def _check_optimizer(config: TrainConfig) -> None:
    """The optimizer, and its schedule, can be made for the run."""
    made = config.optimizer.make(config.total_steps)
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"make() of the optimizer {type(config.optimizer).__name__} returns "
            f"{ranges.shown(made)}; it must return an optax.GradientTransformation"
        )


def _check_kind_of_data(config: TrainConfig) -> None:
    spec = config.objective.window_spec(config.phases[0].sequence_length)
    sets = [config.data.of_evaluation_set(one) for one in config.evaluation.sets]
    for data in (config.data, *sets):
        data.check_objective(type(config.objective).__name__, spec)


def _check_tokenizers(config: TrainConfig) -> None:
    """The sizes of tokenizers that are trained for the run, before they are."""
    model = config.model
    if not isinstance(model, TextConfig):
        return
    tables = {"tokenizer": (model.vocab_size, "vocab_size")}
    if isinstance(model, EncoderDecoderConfig):
        own = "decoder_vocab_size"
        field = own if hasattr(model, own) else "vocab_size"
        tables["target_tokenizer"] = model.decoder.vocab_size, field
    for name, (entries, field) in tables.items():
        tokenizer = config.data.tokenizers.get(name)
        if tokenizer and tokenizer.needs_training and tokenizer.vocab_size > entries:
            raise UserError(
                f"data.{name}.vocab_size is {tokenizer.vocab_size}, but model.{field} is "
                f"{entries}; set --data.{name.replace('_', '-')}.vocab-size {entries}, or a larger "
                f"model.{field}"
            )


def _check_outputs(config: TrainConfig) -> None:
    spec = config.objective.window_spec(config.phases[0].sequence_length)
    outputs = config.model.num_labels
    if spec.target_kind == "numbers" and outputs != 1:
        raise UserError(
            f"objective.loss is 'mse', of one number, but model.num_labels is {outputs}; set "
            "--model.num-labels 1"
        )
    model, channels = config.model.image_encoder, config.data.image_channels
    if model is None or channels is None:
        return
    if channels != model.num_channels:
        raise UserError(
            f"data.channels is {channels}, but model.num_channels is {model.num_channels}; set "
            f"--data.channels {model.num_channels}"
        )


def _check_image_size(config: TrainConfig, phase: AnyPhase) -> None:
    """Images of a phase consist of whole patches, or have the size that the model was made for."""
    model = config.model.image_encoder
    if model is None:
        return
    of_pairs: int | None = getattr(config.objective, "image_size", None)
    size, patch = of_pairs or phase.sequence_length, model.patch_size
    field = "objective.image_size" if of_pairs else "phases.image_size"
    if size < patch:
        raise UserError(
            f"{field} is {size}, less than one patch of model.patch_size {patch}; set it "
            f"to {patch} or more"
        )
    if size % patch and (size, size) != model.image_shape:
        raise UserError(
            f"{field} is {size}, of which patches of model.patch_size {patch} leave out "
            f"{size % patch} pixels at two edges; set it to {size - size % patch} or "
            f"{size - size % patch + patch}"
        )


def _holds_out(config: TrainConfig, prepared: Dataset) -> bool:
    """Whether there is something to evaluate on besides evaluation sets."""
    if prepared.held_out_fingerprint is not None:
        return True
    spec = config.objective.window_spec(config.phases[0].sequence_length)
    return prepared.examples("validation", spec) is not None


def _check_row(
    config: TrainConfig, phase: AnyPhase, row: Mapping[str, np.ndarray], *, batched: bool = False
) -> None:
    """``row``, or a batch of rows, against what the model takes and what its heads give."""
    objective = type(config.objective).__name__
    limits = dict(config.model.input_limits())
    heads = config.objective.needs.heads
    for name, value in row.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise UserError(
                f"{name} of the rows that objective {objective} makes are not all finite; check "
                "the numbers in the data"
            )
    if "unembed" in heads:
        tokens = limits.get("decoder_input_ids", limits.get("input_ids"))
        if tokens is not None:
            limits |= dict.fromkeys(("labels", "masked_labels"), tokens)
    for name, limit in limits.items():
        if name not in row or row[name].dtype.kind not in "iu":
            continue
        ids = row[name]
        length = ids.shape[-1] if ids.ndim > batched else 1
        if limit.length is not None and length > limit.length:
            raise UserError(
                f"objective {objective} makes {name} of {length} tokens at sequence_length "
                f"{phase.sequence_length}, but model.max_positions allows {limit.length}; set "
                "--phases.N.sequence-length (or objective.target_length, where there is one) lower"
            )
        largest = int(ids.max(initial=0))
        if limit.below is not None and largest >= limit.below:
            raise UserError(
                f"objective {objective} makes {name} up to {largest}, but {limit.below_field} is "
                f"{limit.below}; {_remedy(config, name, largest)}"
            )
        if name in config.model.input_limits() and int(ids.min(initial=0)) < 0:
            raise UserError(
                f"objective {objective} makes {name} down to {int(ids.min())}, which are no ids; "
                "check the data and the tokenizer"
            )
    if LABEL_HEADS.intersection(heads) and "labels" in row and row["labels"].dtype.kind in "iu":
        largest = int(row["labels"].max(initial=0))
        if largest >= config.model.num_labels:
            raise UserError(
                f"the data have a class of number {largest}, but model.num_labels is "
                f"{config.model.num_labels}; set --model.num-labels {largest + 1}"
            )


def _remedy(config: TrainConfig, name: str, largest: int) -> str:
    if name == "token_type_ids" and hasattr(config.objective, "framing"):
        return "set --objective.framing roberta, which has no token types, or model.token_types"
    if name == "token_type_ids":
        return f"set --model.token-types {largest + 1}, or choose an objective without pairs"
    return f"set --model.vocab-size {largest + 1} or more, or choose another tokenizer"


def _check_sizes(model: TextConfig, vocabulary: Vocabulary, by_segment: bool) -> None:
    """The embedding tables have a row for each id, and one id stands for padding."""
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary.size} tokens, but model.vocab_size is "
            f"{model.vocab_size}; set --model.vocab-size {vocabulary.size}"
        )
    # Rows of a causal objective say by their segments where padding is.
    if not by_segment and model.pad_id not in (-1, vocabulary.pad_id):
        raise UserError(
            f"the tokenizer pads with id {vocabulary.pad_id}, but model.pad_id is {model.pad_id}: "
            f"the model would take padding for text; set --model.pad-id {vocabulary.pad_id}"
        )
    if isinstance(model, EncoderDecoderConfig):
        _check_target_vocabulary(model, vocabulary)


def _check_target_vocabulary(model: EncoderDecoderConfig, vocabulary: Vocabulary) -> None:
    target, entries = vocabulary.of_targets, model.decoder.vocab_size
    if vocabulary.target is not None and model.share_embeddings:
        raise UserError(
            "the targets have a tokenizer of their own, but the model has one embedding table for "
            "both sides; set --model.share-embeddings False and --model.decoder-vocab-size "
            f"{target.size}, or leave out data.target_tokenizer"
        )
    if target.size > entries:
        raise UserError(
            f"the tokenizer of the targets has {target.size} tokens, but model.decoder_vocab_size "
            f"is {entries}; set --model.decoder-vocab-size {target.size}"
        )
    if vocabulary.pad_id != target.pad_id:
        raise UserError(
            f"the tokenizer of the sources pads with id {vocabulary.pad_id} and that of the "
            f"targets with {target.pad_id}, but a model has one id for it; choose two that agree"
        )


def _faults_of_ends(
    model: TextConfig, needs: ModelNeeds, vocabulary: Vocabulary
) -> Iterator[tuple[str, str, int | None]]:
    """Where text that the model learns to write does not begin or end as its config says."""
    writes = "unembed" in needs.heads and (needs.causal or "decoder_input_ids" in needs.inputs)
    if writes or model.ends_in_embedding:
        yield from _different_ends(model, vocabulary, getattr(model, "eos_ids", ()))


def _different_ends(
    model: TransformerConfig, vocabulary: Vocabulary, ends: Sequence[int]
) -> Iterator[tuple[str, str, int | None]]:
    """Where the tokenizer ends a text with none of ``ends``, or begins one with another id than the
    model: what is wrong, the field of the model, and what it would have to be."""
    written = vocabulary.of_targets
    end, begin = written.end_id, getattr(model, "bos_id", None)
    if ends and end is not None and end not in ends:
        yield (
            f"the tokenizer ends a text with id {end}, but model.eos_ids is {tuple(ends)}: no text "
            "would end there",
            "eos_ids",
            end,
        )
    fault = None
    if begin is not None and begin >= written.size:
        fault = f"model.bos_id is {begin}, but the tokenizer has {written.size} tokens"
    elif begin is not None and written.bos_id not in (None, begin):
        fault = f"the tokenizer begins a text with id {written.bos_id}, but model.bos_id is {begin}"
    if fault is not None:
        yield fault, "bos_id", written.bos_id


def _check_decoder_start(model: TransformerConfig, row: Arrays) -> None:
    start = getattr(model, "decoder_start_id", None)
    if start is None or "decoder_input_ids" not in row:
        return
    first = int(row["decoder_input_ids"].reshape(-1)[0])
    if first != start:
        raise UserError(
            f"the decoder's rows begin with id {first}, but model.decoder_start_id is {start}; set "
            f"--model.decoder-start-id {first}, or objective.decoder_start_id"
        )


def _check_classes(config: TrainConfig, prepared: Dataset) -> None:
    if LABEL_HEADS.isdisjoint(config.objective.needs.heads):
        return
    check_label_names(config.model, prepared)
    classes = len(prepared.label_names)
    if classes and classes != config.model.num_labels:
        raise UserError(
            f"the data has {classes} classes, but model.num_labels is {config.model.num_labels}; "
            f"set --model.num-labels {classes}"
        )
