"""What a masked language model puts in the gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.data.store import TokenStore
from flax_transformers.data.tokenizers import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import ModelFunctions, Params

MASK = "[MASK]"


@dataclass(frozen=True)
class Gap:
    """A masked place: the likeliest pieces with their probabilities, best first.

    ``truth`` is the piece that stood there, where it is known.
    """

    candidates: list[tuple[str, float]]
    truth: str | None = None


@dataclass(frozen=True)
class Filled:
    """A text with its gaps shown as [MASK], and what the model puts there."""

    text: str
    gaps: list[Gap]


def fill_mask(
    functions: ModelFunctions,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    *,
    top: int = 5,
    max_length: int,
) -> Filled:
    """The ``top`` likeliest pieces for every ``[MASK]`` in ``text``.

    Raises UserError if there is no [MASK], more tokens than ``max_length``, or ``top`` below 1.
    """
    if top < 1:
        raise UserError(f"the {top} likeliest pieces are none; ask for at least 1")
    parts = text.split(MASK)
    if len(parts) == 1:
        raise UserError(f'the text has no {MASK}; mark the gap, as in "The capital is {MASK}."')
    vocabulary = tokenizer.vocabulary
    encoded = tokenizer.encode_batch(parts)
    ids = list(encoded[0])
    for part in encoded[1:]:
        ids += [vocabulary.mask_id, *part]
    if len(ids) + 2 > max_length:
        raise UserError(
            f"the text has {len(ids) + 2} tokens, but the model takes {max_length}; shorten it"
        )
    ids = np.array([vocabulary.cls_id, *ids, vocabulary.sep_id], np.int32)
    return Filled(text, _fill(functions, params, tokenizer, ids, top, max_length))


def _fill(
    functions: ModelFunctions,
    params: Params,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    top: int,
    max_length: int,
) -> list[Gap]:
    """Candidates for every mask in a row of ids [T]."""
    vocabulary = tokenizer.vocabulary
    positions = np.flatnonzero(ids == vocabulary.mask_id)
    # Rows are filled up to a power of two that the model takes: few shapes, few compilations.
    length = min(1 << max(4, int(np.ceil(np.log2(len(ids))))), max_length)
    padded = np.full((1, length), vocabulary.pad_id, np.int32)
    padded[0, : len(ids)] = ids
    mask = (np.arange(length) < len(ids)).astype(np.int32)[None, :]
    hidden = functions.hidden_states(params, {"input_ids": padded, "attention_mask": mask}, {})
    logits = functions.unembed(params, jnp.take(hidden, positions, axis=1))
    special = np.zeros(logits.shape[-1], bool)
    special[list(vocabulary.special_ids)] = True
    special[vocabulary.size :] = True
    logits = jnp.where(special[None, None, :], jnp.finfo(jnp.float32).min, logits)
    top = min(top, int((~special).sum()))
    values, best = jax.lax.top_k(jax.nn.softmax(logits, axis=-1)[0], top)
    values, best = jax.device_get((values, best))
    return [
        Gap(list(zip(tokenizer.pieces(row), map(float, probabilities), strict=True)))
        for row, probabilities in zip(best, values, strict=True)
    ]


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
    """Held-out sentences with one piece masked each, and what the model puts there.

    The piece is a whole word in sentences that have such. Sentences and gaps are drawn by
    ``seed``; up to ``count`` come back.
    """
    vocabulary = tokenizer.vocabulary
    rng = np.random.default_rng(seed)
    ends = store.sentence_ends
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    fitting = np.flatnonzero((lengths >= 8) & (lengths <= min(24, max_length - 2)))
    samples = []
    for number in rng.permutation(fitting)[:count]:
        tokens = store.tokens(int(starts[number]), int(lengths[number]))
        places = _gap_places(tokenizer, tokens)
        if not len(places):
            continue
        place = int(rng.choice(places))
        ids = np.array([vocabulary.cls_id, *tokens, vocabulary.sep_id], np.int32)
        ids[place + 1] = vocabulary.mask_id
        gaps = _fill(functions, params, tokenizer, ids, 3, max_length)
        truth = tokenizer.pieces(tokens[place : place + 1])[0]
        before, after = tokenizer.decode(tokens[:place]), tokenizer.decode(tokens[place + 1 :])
        text = f"{before} {MASK} {after}".strip()
        samples.append(Filled(text, [Gap(gaps[0].candidates, truth)]))
    return samples


def _gap_places(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Places of pieces that are words, between two starts of words; if none, of ordinary pieces."""
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
    """Samples as plain text, a block of lines each."""
    lines = []
    for sample in samples:
        lines.append(sample.text)
        for gap in sample.gaps:
            shown = "  ".join(f"{piece} {100 * p:.0f}%" for piece, p in gap.candidates)
            truth = f"  (was: {gap.truth})" if gap.truth is not None else ""
            lines.append(f"    {shown}{truth}")
    return "\n".join(lines)
