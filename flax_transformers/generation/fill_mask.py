"""Predictions of masked language models for masked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.generation.prompts import noted_frame, require_known
from flax_transformers.objectives.base import Batch, ModelFunctions, Params, Vocabulary
from flax_transformers.objectives.rows import bert_frame

MASK = "[MASK]"
"""Marks a masked token in a text, like the tokenizer's own mask token."""


@dataclass(frozen=True)
class MaskedToken:
    """The most likely tokens at a mask with their probabilities, best first; ``truth`` is the
    original token, if known."""

    candidates: list[tuple[str, float]]
    truth: str | None = None


@dataclass(frozen=True)
class Filled:
    """A text with masks shown as [MASK], and the predictions for each."""

    text: str
    masked: list[MaskedToken]


def fill_mask(
    functions: ModelFunctions,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    *,
    top: int = 5,
    max_length: int | None = None,
    vocab_size: int | None = None,
    pad_id: int = -1,
) -> Filled:
    """The ``top`` most likely tokens for every ``[MASK]`` in ``text``.

    ``vocab_size`` and ``pad_id`` are the model's, by default (-1 for ``pad_id``) the tokenizer's.
    Raises UserError if there is no [MASK], for ids that the model does not have, more tokens than
    ``max_length``, or ``top`` below 1.
    """
    if top < 1:
        raise UserError(f"top is {top}; it must be at least 1")
    ids = masked_prompt(tokenizer, text, max_length=max_length, vocab_size=vocab_size)
    vocabulary = tokenizer.vocabulary
    if vocab_size is not None:
        vocabulary = vocabulary.within(vocab_size)
    if pad_id >= 0:
        vocabulary = replace(vocabulary, pad_id=pad_id)
    masked = _fill(functions, params, tokenizer, ids, top, max_length, vocabulary)
    return Filled(text, masked)


def require_filler(model: Any, place: object) -> None:
    """Raises UserError for a model, read from ``place``, that does not predict masked tokens."""
    said = f"{place} holds a {model.config.architecture}, which"
    if not hasattr(model, "unembed"):
        raise UserError(f"{said} predicts no tokens; give a model with a language-modelling head")
    if "decoder_input_ids" in model.inputs:
        raise UserError(
            f"{said} is an encoder-decoder and fills no masks; give a masked language model, or "
            "use flax-transformers generate"
        )
    if getattr(model.config, "causal", False):
        raise UserError(
            f"{said} sees only the text before a mask; give a masked language model, or use "
            "flax-transformers generate"
        )


def masked_prompt(
    tokenizer: Tokenizer,
    text: str,
    *,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> np.ndarray:
    """The ids of a text with masks, with the special tokens of training, int32 [T].

    Raises UserError if there is no [MASK], for ids of ``vocab_size`` or more, and for more tokens
    than ``max_length``.
    """
    ids = _prompt(tokenizer, text)
    if vocab_size is not None:
        require_known(tokenizer, ids.tolist(), vocab_size, "text")
    if max_length is not None and len(ids) > max_length:
        raise UserError(
            f"the text has {len(ids)} tokens, but the model takes {max_length}; shorten it"
        )
    return ids


def _prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    vocabulary = tokenizer.vocabulary
    if vocabulary.mask_id is None:
        raise UserError("the model's tokenizer has no mask token; give a masked language model")
    name = tokenizer.pieces([vocabulary.mask_id])[0]
    marked = text.replace(MASK, name)
    if name not in marked:
        raise UserError(f'the text has no {name}; add one, as in "The capital is {name}."')
    frame = noted_frame(tokenizer) or bert_frame(vocabulary)
    ids = tokenizer.encode_prompt(marked).tolist()
    return np.array([*frame.before, *ids, *frame.after], np.int32)


def _fill(
    functions: ModelFunctions,
    params: Params,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    top: int,
    max_length: int | None,
    vocabulary: Vocabulary,
) -> list[MaskedToken]:
    """Candidates from the ``vocabulary`` for every mask in a row of ids [T]."""
    positions = np.flatnonzero(ids == vocabulary.mask_id)
    # Padding to a power of two limits the number of compiled shapes.
    length = 1 << max(4, int(np.ceil(np.log2(len(ids)))))
    length = length if max_length is None else min(length, max_length)
    padded = np.full((1, length), vocabulary.pad_id, np.int32)
    padded[0, : len(ids)] = ids
    mask = (np.arange(length) < len(ids)).astype(np.int32)[None, :]
    batch = {"input_ids": padded, "attention_mask": mask}
    ordinary = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special_ids)
    found = _most_likely(functions, params, batch, positions, ordinary, min(top, len(ordinary)))
    values, best = jax.device_get(found)
    return [
        MaskedToken(list(zip(tokenizer.pieces(row), map(float, probabilities), strict=True)))
        for row, probabilities in zip(best, values, strict=True)
    ]


@partial(jax.jit, static_argnums=(0, 5))
def _most_likely(
    functions: ModelFunctions,
    params: Params,
    batch: Batch,
    positions: jax.Array,
    ordinary: jax.Array,
    top: int,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities and ids [G, top] of the most likely of the ids ``ordinary``, best first."""
    hidden_BTD = functions.hidden_states(params, batch, {}).last_hidden_state
    logits_BGV = functions.unembedding(params, jnp.take(hidden_BTD, positions, axis=1)).logits()
    probabilities = jax.nn.softmax(jnp.take(logits_BGV[0], ordinary, axis=-1), axis=-1)
    values, best = jax.lax.top_k(probabilities, top)
    found = values, ordinary[best]
    if jax.sharding.get_abstract_mesh().empty:
        return found
    return jax.lax.with_sharding_constraint(found, PartitionSpec())  # replicated


def held_out_samples(
    functions: ModelFunctions,
    params: Params,
    tokenizer: Tokenizer,
    store: TokenStore,
    *,
    count: int,
    max_length: int,
    seed: int = 0,
) -> list[Filled]:
    """Up to ``count`` held-out sentences with one masked token each, and the predictions for it.

    The token is a whole word if the sentence has one. ``seed`` selects sentences and tokens.
    """
    vocabulary = tokenizer.vocabulary
    assert vocabulary.mask_id is not None  # refused when examples are prepared
    frame = bert_frame(vocabulary)
    rng = np.random.default_rng(seed)
    ends = store.sentence_ends
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    fitting = np.flatnonzero((lengths >= 8) & (lengths <= min(24, max_length - 2)))
    samples = []
    for number in rng.permutation(fitting)[:count]:
        tokens = store.tokens(int(starts[number]), int(lengths[number]))
        positions = _maskable(tokenizer, tokens)
        if not len(positions):
            continue
        position = int(rng.choice(positions))
        ids = np.array([*frame.before, *tokens, *frame.after], np.int32)
        ids[len(frame.before) + position] = vocabulary.mask_id
        masked = _fill(functions, params, tokenizer, ids, 3, max_length, vocabulary)
        truth = tokenizer.pieces(tokens[position : position + 1])[0]
        before = tokenizer.decode(tokens[:position])
        after = tokenizer.decode(tokens[position + 1 :])
        text = f"{before} {MASK} {after}".strip()
        samples.append(Filled(text, [MaskedToken(masked[0].candidates, truth)]))
    return samples


def _maskable(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Positions of tokens that are whole words; if there are none, of all ordinary tokens."""
    vocabulary = tokenizer.vocabulary
    ordinary = ~np.isin(tokens, vocabulary.special_ids)
    if vocabulary.word_start is not None:
        starts = np.append(vocabulary.word_start[tokens], True)
        spelt = [any(map(str.isalnum, piece)) for piece in tokenizer.pieces(tokens)]
        words = ordinary & starts[:-1] & starts[1:] & spelt
        if words.any():
            return np.flatnonzero(words)
    return np.flatnonzero(ordinary)


def format_samples(samples: Sequence[Filled]) -> str:
    """Samples as plain text, several lines each."""
    lines = []
    for sample in samples:
        lines.append(sample.text)
        for one in sample.masked:
            shown = "  ".join(f"{piece} {100 * p:.0f}%" for piece, p in one.candidates)
            truth = f"  (was: {one.truth})" if one.truth is not None else ""
            lines.append(f"    {shown}{truth}")
    return "\n".join(lines)
