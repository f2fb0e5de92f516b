"""Samples of a model during a run: held-out text, and what the model predicts for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.evaluation.baselines import sentinels_in_turn
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.generation.choices import settings_of
from flax_transformers.generation.decode import generate
from flax_transformers.generation.fill_mask import format_samples, held_out_samples
from flax_transformers.generation.translate import generate_target
from flax_transformers.objectives.rows import end_id
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig

SAMPLES = 6
"""Number of samples at each evaluation."""
TEMPERATURE = 0.8
"""Sampling temperature of continuations; greedy text of a small model repeats itself."""


@dataclass(frozen=True)
class Written:
    """The prompt ``given`` to the model, what it ``wrote``, and the reference ``truth``."""

    given: str
    wrote: str
    truth: str


def filled_samples(prepared: PreparedText) -> Callable[[Snapshot], str]:
    """A function of a snapshot: held-out sentences with one mask each, and what the model fills in,
    as text."""
    store = prepared.validation
    assert store is not None
    return lambda snapshot: format_samples(
        held_out_samples(
            snapshot.functions,
            snapshot.params,
            prepared.tokenizer,
            store,
            count=SAMPLES,
            max_length=snapshot.phase.sequence_length,
        )
    )


def continued_samples(
    config: TrainConfig, prepared: PreparedText, model: nn.Module
) -> Callable[[Snapshot], str]:
    """A function of a snapshot: the first half of held-out documents, and the continuation that a
    decoder samples, as text."""
    return lambda snapshot: format_written(
        continued(prepared, model, snapshot.params, held_out_rows(config, prepared))
    )


def answered_samples(
    config: TrainConfig, prepared: PreparedText, model: nn.Module
) -> Callable[[Snapshot], str]:
    """A function of a snapshot: held-out sources, and the targets that an encoder-decoder
    writes, as text."""
    return lambda snapshot: format_written(
        answered(prepared, model, snapshot.params, held_out_rows(config, prepared))
    )


def held_out_rows(
    config: TrainConfig, prepared: PreparedText, count: int = SAMPLES
) -> list[dict[str, np.ndarray]]:
    """Up to ``count`` rows of the first held-out batch, spread over it."""
    batch = next(held_out_batches(config, prepared, config.phases[-1].sequence_length), None)
    if batch is None:
        return []
    return [{name: batch[name][row] for name in batch} for row in _spread(batch, count)]


def _spread(batch: dict[str, np.ndarray], count: int) -> list[int]:
    """Indices of rows of a batch, evenly spread, without its padding rows."""
    real = np.flatnonzero(batch["example_id"] >= 0)
    indices = np.linspace(0, len(real) - 1, min(count, len(real)))
    return [int(real[int(index)]) for index in indices]


def continued(
    prepared: PreparedText, model: nn.Module, params: Any, rows: Sequence[dict[str, np.ndarray]]
) -> list[Written]:
    """Continuations of the first half of each row's first document, sampled at `TEMPERATURE`."""
    if not rows:
        return []
    vocabulary, tokenizer = prepared.vocabulary, prepared.tokenizer
    texts = [row["input_ids"][row["segment_ids"] == 1] for row in rows]
    labels = [row["labels"][row["segment_ids"] == 1] for row in rows]
    length = len(rows[0]["input_ids"])
    half = length // 2
    ids = np.full((len(rows), half), vocabulary.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        kept = text[: max(1, min(half, len(text) // 2))]
        ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
    end, settings = vocabulary.end_id, None
    if "prefix_mask" in rows[0]:
        settings = replace(settings_of(model), bidirectional_prompt=True)
    new = jax.device_get(
        generate(
            model,
            params,
            ids,
            mask,
            max_new_tokens=length - half,
            eos_id=() if end is None else end,
            pad_id=vocabulary.pad_id,
            temperature=TEMPERATURE,
            key=jax.random.key(0),
            settings=settings,
        )
    )
    return [
        Written(
            readable_text(tokenizer, label[: used - 1]),
            readable_text(tokenizer, _before(end, row)),
            readable_text(tokenizer, label[used - 1 :]),
        )
        for label, row, used in zip(labels, new, mask.sum(axis=1), strict=True)
    ]


def answered(
    prepared: PreparedText, model: nn.Module, params: Any, rows: Sequence[dict[str, np.ndarray]]
) -> list[Written]:
    """Targets of each row's first source, by the model's generation settings."""
    if not rows:
        return []
    vocabulary, target = prepared.vocabulary, prepared.vocabulary.of_targets
    tokenizer = prepared.target_tokenizer or prepared.tokenizer
    ids = np.stack([row["input_ids"] for row in rows])
    inputs = np.stack([_first_part(row, "") for row in rows])
    targets = np.stack([_first_part(row, "decoder_") for row in rows])
    labels = np.stack([row["labels"] for row in rows])
    new = jax.device_get(
        generate_target(
            model,
            params,
            np.where(inputs, ids, vocabulary.pad_id),
            inputs,
            max_new_tokens=targets.shape[1] - 1,
            start_ids=[int(rows[0]["decoder_input_ids"][0])],
            eos_id=end_id(target),
            pad_id=target.pad_id,
        )
    )
    return [
        Written(
            readable_text(prepared.tokenizer, ids[row][inputs[row] > 0]),
            readable_text(tokenizer, _before(end_id(target), new[row])),
            readable_text(tokenizer, labels[row][targets[row] > 0]),
        )
        for row in range(len(rows))
    ]


def _first_part(row: dict[str, np.ndarray], side: str) -> np.ndarray:
    """Mask of the first segment of one side, "" or "decoder_", int32 [T]."""
    segments = row.get(f"{side}segment_ids")
    mask = row[f"{side}attention_mask"] if segments is None else segments == 1
    return np.asarray(mask, np.int32)


def _before(end: int | None, ids: np.ndarray) -> np.ndarray:
    """The ids before the first ``end``: the padding behind may be an ordinary token."""
    found = np.flatnonzero(ids == end)
    return ids[: found[0]] if len(found) else ids


def readable_text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Text with special tokens by name, but without padding and the tokens around a sequence."""
    vocabulary = tokenizer.vocabulary
    hidden = {vocabulary.pad_id, vocabulary.eos_id, vocabulary.sep_id, vocabulary.cls_id}
    first = vocabulary.sentinel_ids[:1]
    in_turn = sentinels_in_turn(ids, vocabulary)
    text = ""
    run: list[int] = []
    for token, turned in zip(map(int, ids), in_turn.tolist(), strict=True):
        if turned in first or token in vocabulary.special_ids:
            text += tokenizer.decode(run)
            run = []
            text += "" if token in hidden else f" {tokenizer.pieces([token])[0]} "
        else:
            run.append(token)
    return " ".join((text + tokenizer.decode(run)).split())


def format_written(samples: Sequence[Written]) -> str:
    """Samples as plain text, three lines each."""
    return "\n".join(
        f"{sample.given}\n    wrote: {sample.wrote}\n    truth: {sample.truth}"
        for sample in samples
    )
