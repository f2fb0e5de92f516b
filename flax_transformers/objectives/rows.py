"""Functions for ``prepare`` of objectives: special tokens, padding, random ids. Only numpy."""

from __future__ import annotations

import functools

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, Frame, Vocabulary


def frame(example: Arrays, vocab: Vocabulary) -> np.ndarray:
    """``[CLS] tokens [SEP]`` int32, with another [SEP] after each document that ends inside."""
    cls_id, sep_id = framing_ids(vocab)
    tokens, ends = example["tokens"], example["document_ends"]
    inside = ends[ends < len(tokens)]
    body = np.insert(tokens, inside, sep_id)
    return np.concatenate([[cls_id], body, [sep_id]]).astype(np.int32)


def bert_frame(vocab: Vocabulary) -> Frame:
    """``[CLS] A [SEP]``, and ``[CLS] A [SEP] B [SEP]``. Raises UserError as `framing_ids`."""
    cls_id, sep_id = framing_ids(vocab)
    return Frame((cls_id,), (sep_id,), ())


def framing_ids(vocab: Vocabulary) -> tuple[int, int]:
    """The ids of [CLS] and [SEP]. Raises UserError for a tokenizer without them."""
    if vocab.cls_id is None or vocab.sep_id is None:
        raise UserError(
            "the tokenizer has no [CLS] and [SEP], with which examples of this objective begin and "
            "end; choose another tokenizer"
        )
    return vocab.cls_id, vocab.sep_id


def end_id(vocab: Vocabulary) -> int:
    """The id that ends a text. Raises UserError for a tokenizer that has none."""
    if vocab.end_id is None:
        raise UserError(
            "the tokenizer has neither an end-of-sequence token nor [SEP], one of which marks the "
            "end of a text; choose another tokenizer"
        )
    return vocab.end_id


def run_frame(objective: object, vocab: Vocabulary) -> Frame | None:
    """Special tokens that an objective puts around one text, by its method ``frame``.

    None if it has no such method, or the tokenizer lacks a token for it.
    """
    method = getattr(objective, "frame", None)
    try:
        return method(vocab) if callable(method) else None
    except UserError:
        return None


def document_start(vocab: Vocabulary) -> int:
    """The id before the first token of a document, in training and in prompts.

    The one that the tokenizer's own files put there, else its BOS token, else the id that ends the
    previous document (GPT-2).
    """
    if vocab.frame is not None and vocab.frame.before:
        return vocab.frame.before[-1]
    return end_id(vocab) if vocab.bos_id is None else vocab.bos_id


def start_id(vocab: Vocabulary) -> int | None:
    """The id that begins a sequence: of BOS, else of [CLS], else None."""
    return vocab.cls_id if vocab.bos_id is None else vocab.bos_id


def random_ordinary(rng: np.random.Generator, count: int, vocab: Vocabulary) -> np.ndarray:
    """``count`` ids drawn uniformly from those that are not special, int32."""
    below = _ordinary_below(vocab.special_ids)
    ids = rng.integers(0, vocab.size - len(below), count)
    return (ids + np.searchsorted(below, ids, side="right")).astype(np.int32)


@functools.lru_cache(maxsize=16)
def _ordinary_below(special_ids: tuple[int, ...]) -> np.ndarray:
    """Number of ordinary ids below each special one, in increasing order: int64 [n]."""
    return np.sort(np.asarray(special_ids, np.int64)) - np.arange(len(special_ids))


def pad(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """``values`` padded with ``fill`` to ``length``; integers become int32."""
    dtype = np.float32 if values.dtype == np.float32 else np.int32
    row = np.full(length, fill, dtype)
    row[: len(values)] = values
    return row


def padded_tokens(
    ids: np.ndarray, length: int, vocab: Vocabulary, token_types: np.ndarray | None = None
) -> Arrays:
    """``input_ids``, ``attention_mask`` and, if given, ``token_type_ids``: int32 [length]."""
    row = {
        "input_ids": pad(ids, length, vocab.pad_id),
        "attention_mask": (np.arange(length) < len(ids)).astype(np.int32),
    }
    if token_types is not None:
        row["token_type_ids"] = pad(token_types, length, 0)
    return row
