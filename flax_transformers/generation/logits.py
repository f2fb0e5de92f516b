"""Logit processors of generation settings, as pure functions.

Each maps the logits float32 [B, V] of the next token, given the tokens so far, to new logits. A
forbidden token has the logit -inf. ``processed`` applies the processors that the settings ask for,
in the order of transformers. L is the length of the buffer of a row's tokens; in beam search, each
beam is a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.models.generation_settings import GenerationSettings

NEVER = -jnp.inf


class History(NamedTuple):
    """The tokens so far: columns ``first_B`` to ``end`` (exclusive) of ``ids_BL``."""

    ids_BL: jax.Array
    """int32, the prompt (or decoder start) of each row and then its new tokens."""
    first_B: jax.Array
    """int32; columns before it are padding."""
    end: jax.Array
    """An int32 scalar, the same for all rows."""
    written: jax.Array
    """Number of new tokens, an int32 scalar."""

    @classmethod
    def of(
        cls, ids_BT: jax.Array, mask_BT: jax.Array, new_tokens: int, pad: jax.Array | int = 0
    ) -> History:
        """The history of prompts padded on either side, with columns for ``new_tokens`` more, which
        contain ``pad``."""
        order_BT = jnp.argsort(mask_BT, axis=1, stable=True)  # padding first
        ids_BT = jnp.take_along_axis(ids_BT, order_BT, axis=1)
        length = ids_BT.shape[1]
        return cls(
            jnp.pad(ids_BT, ((0, 0), (0, new_tokens)), constant_values=pad),
            length - jnp.sum(mask_BT > 0, axis=1, dtype=jnp.int32),
            jnp.int32(length),
            jnp.int32(0),
        )

    def append(self, ids_B: jax.Array) -> History:
        """The history with one more token of each row."""
        ids_BL = self.ids_BL.at[:, self.end].set(ids_B)
        return History(ids_BL, self.first_B, self.end + 1, self.written + 1)

    def take(self, rows_R: jax.Array) -> History:
        """The histories of some rows, int32 [R]."""
        return self._replace(ids_BL=self.ids_BL[rows_R], first_B=self.first_B[rows_R])

    @property
    def real_BL(self) -> jax.Array:
        """True at tokens."""
        columns_L = jnp.arange(self.ids_BL.shape[1])
        return (columns_L[None, :] >= self.first_B[:, None]) & (columns_L[None, :] < self.end)

    @property
    def length_B(self) -> jax.Array:
        """Number of tokens of each row, int32."""
        return self.end - self.first_B

    def last(self, count: int) -> jax.Array:
        """The last ``count`` tokens int32 [B, count]; undefined for rows with fewer."""
        start = jnp.maximum(self.end - count, 0)
        return jax.lax.dynamic_slice_in_dim(self.ids_BL, start, count, axis=1)


def processed(
    logits_BV: jax.Array,
    history: History,
    settings: GenerationSettings,
    *,
    eos: jax.Array,
    vocab_size: int,
    max_new_tokens: jax.Array | int,
) -> jax.Array:
    """Logits after all processors of ``settings``; ``eos`` int32 [n] are the ids that end a text.

    Ids from ``vocab_size`` on are vocabulary padding, and are forbidden.
    """
    size = logits_BV.shape[-1]
    logits_BV = jnp.where(np.arange(size)[None, :] < vocab_size, logits_BV, NEVER)
    is_eos_V = jnp.any(jnp.arange(size)[:, None] == eos[None, :], axis=1)
    if settings.repetition_penalty not in (None, 1.0):
        logits_BV = penalize_repetition(logits_BV, history, settings.repetition_penalty or 1.0)
    if settings.no_repeat_ngram_size:
        logits_BV = forbid_repeated_ngrams(logits_BV, history, settings.no_repeat_ngram_size)
    if settings.bad_words_ids:
        logits_BV = forbid_words(logits_BV, history, settings.bad_words_ids, is_eos_V)
    if settings.min_length:
        short_B = history.length_B < settings.min_length
        logits_BV = forbid_end(logits_BV, is_eos_V, short_B)
    if settings.min_new_tokens:
        short_B = jnp.full(logits_BV.shape[:1], history.written < settings.min_new_tokens)
        logits_BV = forbid_end(logits_BV, is_eos_V, short_B)
    if settings.forced_bos_token_id is not None:
        at_start_B = history.length_B == 1
        logits_BV = force(logits_BV, (settings.forced_bos_token_id,), at_start_B)
    if settings.forced_eos_ids:
        at_end_B = jnp.full(logits_BV.shape[:1], history.written == max_new_tokens - 1)
        logits_BV = force(logits_BV, settings.forced_eos_ids, at_end_B)
    if settings.suppress_tokens:
        logits_BV = jnp.where(_among(settings.suppress_tokens, size), NEVER, logits_BV)
    if settings.begin_suppress_tokens:
        first_B = jnp.zeros_like(history.first_B)
        if settings.forced_bos_token_id is not None:  # it comes before the first free token
            first_B += history.length_B - history.written == 1
        begins_B1 = (history.written == first_B)[:, None]
        forbidden_BV = begins_B1 & _among(settings.begin_suppress_tokens, size)
        logits_BV = jnp.where(forbidden_BV, NEVER, logits_BV)
    return logits_BV


def penalize_repetition(logits_BV: jax.Array, history: History, penalty: float) -> jax.Array:
    """Penalise tokens that occur in the history (arXiv:1909.05858 §4.1)."""
    seen_BV = _marked(history.ids_BL, history.real_BL, logits_BV.shape[-1])
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def forbid_repeated_ngrams(logits_BV: jax.Array, history: History, size: int) -> jax.Array:
    """Forbid tokens that would repeat a sequence of ``size`` tokens."""
    windows = history.ids_BL.shape[1] - size + 1
    if windows < 1:
        return logits_BV
    before = size - 1
    starts_W = jnp.arange(windows)
    same_BW = jnp.ones((logits_BV.shape[0], windows), bool)
    if before:
        last_BN = history.last(before)
        for offset in range(before):
            ids_BW = history.ids_BL[:, offset : offset + windows]
            same_BW &= ids_BW == last_BN[:, offset, None]
    inside_BW = (starts_W[None, :] >= history.first_B[:, None]) & (
        starts_W[None, :] + size <= history.end
    )
    known_BW = same_BW & inside_BW & (history.length_B >= before)[:, None]
    repeated_BV = _marked(history.ids_BL[:, before:], known_BW, logits_BV.shape[-1])
    return jnp.where(repeated_BV, NEVER, logits_BV)


def forbid_words(
    logits_BV: jax.Array,
    history: History,
    words: Sequence[Sequence[int]],
    is_eos_V: jax.Array,
) -> jax.Array:
    """Forbid the last token of each sequence of ``words`` after its other tokens. A single token is
    forbidden everywhere, unless it is one of the end tokens."""
    size = logits_BV.shape[-1]
    single = [word[0] for word in words if len(word) == 1]
    logits_BV = jnp.where(_among(single, size) & ~is_eos_V[None, :], NEVER, logits_BV)
    for length in sorted({len(word) for word in words if 1 < len(word) <= history.ids_BL.shape[1]}):
        word_WN = np.array([word for word in words if len(word) == length], np.int32)
        last_BN = history.last(length - 1)
        after_BW = jnp.all(last_BN[:, None, :] == word_WN[None, :, :-1], axis=-1)
        after_BW &= (history.length_B >= length - 1)[:, None]
        last_BW = jnp.broadcast_to(word_WN[:, -1], after_BW.shape)
        logits_BV = jnp.where(_marked(last_BW, after_BW, size), NEVER, logits_BV)
    return logits_BV


def forbid_end(logits_BV: jax.Array, is_eos_V: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Forbid the end tokens in the rows where ``rows_B`` is true."""
    return jnp.where(rows_B[:, None] & is_eos_V[None, :], NEVER, logits_BV)


def force(logits_BV: jax.Array, ids: Sequence[int], rows_B: jax.Array) -> jax.Array:
    """Allow only ``ids``, with equal logits, in the rows where ``rows_B`` is true."""
    forced_1V = jnp.where(_among(ids, logits_BV.shape[-1]), 0.0, NEVER)
    return jnp.where(rows_B[:, None], forced_1V, logits_BV)


def _among(ids: Sequence[int], size: int) -> np.ndarray:
    """Mask of ``ids`` over the vocabulary, bool [1, V]."""
    return np.isin(np.arange(size), list(ids))[None, :]


def _marked(ids_BN: jax.Array, where_BN: jax.Array, size: int) -> jax.Array:
    """Mask over the vocabulary of the ids where ``where_BN`` is true, bool [B, V]."""
    rows_B1 = jnp.arange(ids_BN.shape[0])[:, None]
    return jnp.zeros((ids_BN.shape[0], size), bool).at[rows_B1, ids_BN].max(where_BN)
