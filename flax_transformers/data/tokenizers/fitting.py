"""Vocabularies for models that have fewer embeddings than the tokenizer has tokens."""

from __future__ import annotations

import dataclasses
import logging

from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.objectives.base import Vocabulary

log = logging.getLogger(__name__)


def fitted_vocabulary(
    whole: Vocabulary, vocab_size: int, pad_id: int, target_vocab_size: int
) -> Vocabulary:
    """The part of a vocabulary that a model has embeddings for: ``vocab_size`` of them, and
    ``target_vocab_size`` for targets with their own tokenizer.

    If the tokenizer has no padding token, the padding is the model's ``pad_id`` (-1: none).
    """
    known = whole.within(vocab_size, pad_id)
    if whole.target is None:
        return known
    return dataclasses.replace(known, target=whole.target.within(target_vocab_size, pad_id))


def padded_vocabulary(whole: Vocabulary, vocab_size: int, pad_id: int) -> Vocabulary:
    """`fitted_vocabulary` of text that is tokenized when it is read: any token may occur in it, so
    none is left out, and the check of the run refuses a model with fewer embeddings."""
    return fitted_vocabulary(whole, max(vocab_size, whole.size), pad_id, whole.of_targets.size)


def warn_left_out(tokenizer: Tokenizer, whole: Vocabulary, known: Vocabulary) -> None:
    """Logs how many tokens of the tokenizer the model lacks, and their roles."""
    lost = {role: i for role, i in whole.roles.items() if i >= known.size}
    names = [f"{role} {tokenizer.pieces([i])[0]!r} ({i})" for role, i in lost.items()]
    log.warning(
        "the tokenizer has %d tokens and the model %d; the others never occur in the text%s",
        whole.size,
        known.size,
        f", and these roles are left out: {', '.join(names)}" if names else "",
    )
