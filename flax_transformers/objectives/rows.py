"""Pieces of ``prepare`` that objectives share: framing, filling up, random ids. Numpy alone."""

from __future__ import annotations

import functools

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Frame, Vocabulary


def frame(example: dict[str, np.ndarray], vocab: Vocabulary) -> np.ndarray:
    """[CLS] tokens [SEP], with a further [SEP] after each document that ends inside; int32."""
    cls_id, sep_id = framing_ids(vocab)
    tokens, ends = example["tokens"], example["document_ends"]
    inside = ends[ends < len(tokens)]
    body = np.insert(tokens, inside, sep_id)
    return np.concatenate([[cls_id], body, [sep_id]]).astype(np.int32)


def framing_ids(vocab: Vocabulary) -> tuple[int, int]:
    """The ids of [CLS] and [SEP]. Raises UserError for a tokenizer without them."""
    if vocab.cls_id is None or vocab.sep_id is None:
        raise UserError(
            "the tokenizer has no [CLS] and [SEP], which rows of this objective begin and end "
            "with; choose another"
        )
    return vocab.cls_id, vocab.sep_id


def end_id(vocab: Vocabulary) -> int:
    """The id that ends a text. Raises UserError for a tokenizer that has none."""
    if vocab.end_id is None:
        raise UserError(
            "the tokenizer has neither an end-of-sequence token nor [SEP], one of which marks the "
            "end of a text; choose another"
        )
    return vocab.end_id


def run_frame(objective: object, vocab: Vocabulary) -> Frame | None:
    """What an objective puts around one text, as its method ``frame`` says; None where it has none
    or lacks a token for it."""
    method = getattr(objective, "frame", None)
    try:
        return method(vocab) if callable(method) else None
    except UserError:
        return None


def document_start(vocab: Vocabulary) -> int:
    """What a decoder reads before a document, in training and as the beginning of a prompt.

    What the tokenizer's own files put there, else its token for it, else what ends the document
    before (GPT-2).
    """
    if vocab.frame is not None and vocab.frame.before:
        return vocab.frame.before[-1]
    return end_id(vocab) if vocab.bos_id is None else vocab.bos_id


def start_id(vocab: Vocabulary) -> int | None:
    """The id that begins a sequence: the tokenizer's own, else [CLS], or None."""
    return vocab.cls_id if vocab.bos_id is None else vocab.bos_id


def random_ordinary(rng: np.random.Generator, count: int, vocab: Vocabulary) -> np.ndarray:
    """``count`` ids drawn evenly from those that are not special, int32."""
    below = _ordinary_below(vocab.special_ids)
    ids = rng.integers(0, vocab.size - len(below), count)
    return (ids + np.searchsorted(below, ids, side="right")).astype(np.int32)


@functools.lru_cache(maxsize=16)
def _ordinary_below(special_ids: tuple[int, ...]) -> np.ndarray:
    """How many ids that are not special lie below each that is, in rising order: int64 [n]."""
    return np.sort(np.asarray(special_ids, np.int64)) - np.arange(len(special_ids))


def pad(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """``values`` and then ``fill`` up to ``length``; integers become int32."""
    dtype = np.float32 if values.dtype == np.float32 else np.int32
    row = np.full(length, fill, dtype)
    row[: len(values)] = values
    return row
