"""The training steps that are compared, and a batch for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_transformers.families import bert, gpt2, llama, mae, t5, vit
from flax_transformers.models.config import TextConfig, TransformerConfig, VisionConfig
from flax_transformers.objectives.base import Objective, Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.span_corruption import SpanCorruption

Arrays = dict[str, np.ndarray]
IGNORED = -100
"""The label that Hugging Face's losses leave out."""


@dataclass(frozen=True)
class Case:
    """One model and its batch; ``length`` is in tokens, of an image the side in pixels."""

    model: TransformerConfig
    objective: Objective
    batch: int
    length: int
    for_huggingface: Callable[[Arrays], Arrays]
    """From a batch of ours to that of Hugging Face's model."""

    @property
    def unit(self) -> str:
        """What is counted by the second."""
        return "images" if isinstance(self.model, VisionConfig) else "tokens"

    def rows(self, seed: int = 0) -> Arrays:
        """A batch of sequences without padding, as the data pipeline makes them."""
        rng = np.random.default_rng(seed)
        rows = [self._row(rng) for _ in range(self.batch)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def count(self, batch: Arrays) -> int:
        """Images or tokens of a batch, those of the decoder of an encoder-decoder too."""
        if self.unit == "images":
            return self.batch
        return sum(batch[name].size for name in ("input_ids", "decoder_input_ids") if name in batch)

    def _row(self, rng: np.random.Generator) -> Arrays:
        spec = self.objective.window_spec(self.length)
        if isinstance(self.model, TextConfig):
            vocabulary = _vocabulary(self.model.vocab_size)
            below = min(20_000, vocabulary.size)
            ids = rng.integers(len(vocabulary.special_ids), below, spec.length, dtype=np.int32)
            ends = np.array([], np.int32)
            example: Arrays = {"tokens": ids, "sentence_ends": ends, "document_ends": ends}
        else:
            vocabulary = _vocabulary(8)
            pixels = rng.integers(0, 256, (self.length, self.length, 3), dtype=np.uint8)
            example = {"image": pixels, "label": np.array(rng.integers(1000), np.int32)}
        return self.objective.prepare(example, rng, vocabulary, self.length)


def _vocabulary(size: int) -> Vocabulary:
    sentinels = tuple(range(size - 1, max(size - 1001, 7), -1))
    roles = ("unk_id", "cls_id", "sep_id", "mask_id", "bos_id", "eos_id")
    ids: dict[str, Any] = {name: i for i, name in enumerate(roles, 1)}
    return Vocabulary(
        size=size,
        pad_id=0,
        special_ids=tuple(range(7)),
        sentinel_ids=sentinels,
        word_start=np.ones(size, bool),
        **ids,
    )


def _masked_lm(batch: Arrays) -> Arrays:
    labels = np.full(batch["input_ids"].shape, IGNORED, np.int64)
    for row, places, ids, weights in zip(
        labels,
        batch["masked_positions"],
        batch["masked_labels"],
        batch["masked_weights"],
        strict=True,
    ):
        row[places[weights > 0]] = ids[weights > 0]
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}


def _causal_lm(batch: Arrays) -> Arrays:
    ids = batch["input_ids"]  # the labels are shifted inside of the model
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids.astype(np.int64)}


def _encoder_decoder(batch: Arrays) -> Arrays:
    labels = np.where(batch["weights"] > 0, batch["labels"], IGNORED).astype(np.int64)
    mask = (batch["input_ids"] != 0).astype(np.int32)
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


def _normalized(batch: Arrays) -> Arrays:
    return {"pixel_values": (batch["pixel_values"] / np.float32(127.5) - 1).astype(np.float32)}


def _classified(batch: Arrays) -> Arrays:
    return _normalized(batch) | {"labels": batch["labels"][:, 0].astype(np.int64)}


def _bert(size: str, batch: int, length: int) -> Case:
    return Case(bert.SIZES[size], MaskedLM(), batch, length, _masked_lm)


def _decoder(model: TextConfig, batch: int, length: int) -> Case:
    return Case(model, CausalLM(attend_across=True), batch, length, _causal_lm)


def _t5(size: str, batch: int, length: int) -> Case:
    return Case(t5.SIZES[size], SpanCorruption(), batch, length, _encoder_decoder)


def _vit(size: str, batch: int) -> Case:
    model = dataclasses.replace(vit.SIZES[size], num_labels=1000)
    return Case(model, ImageClassification(), batch, 224, _classified)


def _mae(size: str, batch: int) -> Case:
    return Case(mae.SIZES[size], MaskedImage(), batch, 224, _normalized)


_GPT_1_3B = dataclasses.replace(
    gpt2.SIZES["gpt2"],
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=24,
    num_heads=16,
    max_positions=2048,
)
_LLAMA_8B_LAYERS = dataclasses.replace(llama.SIZES["llama-3-8b"], num_layers=4, vocab_size=32000)

PRESETS: dict[str, dict[str, Case]] = {
    "cpu": {
        "bert-base": _bert("bert-base", 8, 128),
        "t5-small": _t5("t5-small", 8, 128),
        "gpt2-small": _decoder(gpt2.SIZES["gpt2"], 4, 256),
        "vit-s16": _vit("vit-s16", 8),
        "mae-base": _mae("mae-base", 4),
    },
    "gpu": {
        "bert-large": _bert("bert-large", 32, 512),
        "gpt-1.3b": _decoder(_GPT_1_3B, 4, 2048),
        "t5-large": _t5("t5-large", 16, 512),
        "vit-l16": _vit("vit-l16", 128),
        "mae-large": _mae("mae-large", 128),
        "llama-8b-layers": _decoder(_LLAMA_8B_LAYERS, 2, 4096),
    },
}
