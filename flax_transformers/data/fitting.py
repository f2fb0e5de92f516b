"""Prepared text beside a model whose table of embeddings is smaller than the tokenizer."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from flax_transformers.data.mixture import PreparedMixture
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary

log = logging.getLogger(__name__)


def fitted(
    prepared: PreparedText | PreparedMixture, rows: int, pad_id: int, target_rows: int
) -> PreparedText | PreparedMixture:
    """``prepared`` with the part of its vocabulary that a model knows: ``rows`` embeddings for what
    it reads, ``target_rows`` for targets with a tokenizer of their own.

    A model whose padding is ``pad_id`` (-1: none) is given that where the tokenizer has none of its
    own. Raises UserError if the text holds a token that the model has no embedding for.
    """
    whole = prepared.vocabulary
    known = whole.within(rows, pad_id)
    if whole.target is not None:
        known = dataclasses.replace(known, target=whole.target.within(target_rows, pad_id))
    if known == whole:
        return prepared
    if known.size < whole.size:
        _refuse_unknown_tokens(prepared, rows)
        _say_what_is_left_out(prepared.tokenizer, whole, known, rows)
    return dataclasses.replace(prepared, known=known)


def _refuse_unknown_tokens(prepared: PreparedText | PreparedMixture, rows: int) -> None:
    parts = prepared.parts if isinstance(prepared, PreparedMixture) else (prepared,)
    for part in parts:
        if part.target_tokenizer is not None:  # its counts do not tell the sides apart
            continue
        for store in filter(None, (part.train, part.validation)):
            beyond = np.flatnonzero(store.unigram_counts[rows:])
            if len(beyond):
                token = rows + int(beyond[0])
                name = part.tokenizer.pieces([token])[0]
                raise UserError(
                    f"the text in {part.directory} has the token {name!r} with id {token}, but "
                    f"model.vocab_size is {rows}; set --model.vocab-size "
                    f"{part.tokenizer.vocabulary.size} for a model that starts from nothing, or "
                    "take the tokenizer that belongs to the model"
                )


def _say_what_is_left_out(
    tokenizer: Tokenizer, whole: Vocabulary, known: Vocabulary, rows: int
) -> None:
    lost = {role: i for role, i in whole.roles.items() if i >= rows}
    names = [f"{role} {tokenizer.pieces([i])[0]!r} ({i})" for role, i in lost.items()]
    log.warning(
        "the tokenizer has %d tokens and the model %d; the others never occur in the text%s",
        whole.size,
        rows,
        f", and these roles are left out: {', '.join(names)}" if names else "",
    )
