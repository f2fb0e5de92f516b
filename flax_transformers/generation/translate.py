"""Text generation with encoder-decoders.

The encoder runs once, and the keys and values of cross-attention stay in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_transformers.errors import UserError
from flax_transformers.generation.beams import Beams
from flax_transformers.generation.buckets import padded_to_bucket
from flax_transformers.generation.choices import choice_of, settings_of
from flax_transformers.generation.decode import (
    endings_of,
    ids_and_mask,
    new_tokens_of,
    require_positions,
    require_settings,
    run,
)
from flax_transformers.generation.loop import TextLimits
from flax_transformers.generation.program import GenerationRequest, Streamer
from flax_transformers.generation.sampling import Sampling
from flax_transformers.generation.stop_strings import StopStrings
from flax_transformers.models.generation_settings import GenerationSettings


def generate_target(
    model: nn.Module,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int | None = None,
    start_ids: Sequence[int] = (),
    forced_first_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    choice: Sampling | Beams | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    settings: GenerationSettings | None = None,
    stops: StopStrings | None = None,
    streamer: Streamer | None = None,
) -> jax.Array:
    """Generate targets for sources with an encoder-decoder: new tokens int32 [B, max_new_tokens].

    ``input_ids`` int32 [B, S] and ``attention_mask`` [B, S], 1 at tokens, padded on either side.
    The decoder starts with ``start_ids`` (mBART: end of sequence and language), by default the
    model's decoder start id; they are not in the result. ``forced_first_id`` is the first new
    token, whatever its logit, and is in the result (``forced_bos_token_id`` of published models).
    Other arguments are those of ``decode.generate``.

    Raises UserError for settings out of range and more tokens than the model has positions for.
    """
    _require_translator(model)
    settings = settings_of(model) if settings is None else settings
    if forced_first_id is not None:
        settings = replace(settings, forced_bos_token_id=None)
    if choice is None:
        choice = choice_of(settings, key, temperature=temperature, top_k=top_k, top_p=top_p)
    ids_BS, mask_BS = ids_and_mask(model, input_ids, attention_mask)
    start = tuple(start_ids) or (_first_id(model, settings),)
    lengths = mask_BS.sum(axis=1)
    max_new_tokens, key = check_source_lengths(
        model, lengths, start, max_new_tokens, choice, key, settings
    )
    _check_ids(model, () if forced_first_id is None else (forced_first_id,))
    endings = endings_of(model, settings, eos_id, pad_id)
    ids_BS, mask_BS = padded_to_bucket(ids_BS, mask_BS, model.config.filler_id, left=False)
    request = GenerationRequest(
        jnp.asarray(ids_BS),
        jnp.asarray(mask_BS),
        TextLimits(endings, jnp.int32(max_new_tokens), stops),
        key,
        jnp.asarray(start, jnp.int32),
        None if forced_first_id is None else jnp.int32(forced_first_id),
    )
    return run(model, params, request, choice, settings, streamer)


def check_source_lengths(
    model: Any,
    lengths: Sequence[int] | np.ndarray,
    start_ids: Sequence[int],
    max_new_tokens: int | None,
    choice: Sampling | Beams,
    key: jax.Array | None,
    settings: GenerationSettings,
) -> tuple[int, jax.Array]:
    """The number of new tokens for sources of these numbers of tokens, and the random key.

    Needs no parameters. Raises UserError where ``generate_target`` does.
    """
    _require_translator(model)
    start = tuple(start_ids) or (_first_id(model, settings),)
    max_new_tokens = new_tokens_of(settings, max_new_tokens, len(start))
    key = require_settings(max_new_tokens, choice, key)
    _check_ids(model, start)
    # An empty batch has no longest source.
    source, target = int(max(lengths, default=0)), len(start) + max_new_tokens
    both = f"{source} tokens of source and {target} of target"
    require_positions(model, max(source, target), both)
    return max_new_tokens, key


def _require_translator(model: Any) -> None:
    if not hasattr(model, "unembed") or not hasattr(model, "encode"):
        raise UserError(
            f"{model.config.architecture} does not generate targets; use an "
            "encoder-decoder with a language-modelling head"
        )


def _first_id(model: Any, settings: GenerationSettings) -> int:
    first = settings.decoder_start_token_id
    if first is None:
        first = model.config.decoder_start_id
    if not isinstance(first, int):
        raise UserError(
            "the model has no decoder start id; give start_ids, such as the end of a sequence and "
            "the target language"
        )
    return first


def _check_ids(model: Any, ids: Sequence[int]) -> None:
    size = model.config.decoder.vocab_size
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise UserError(
            f"the start of the target has id {wrong}, but the decoder's ids are 0 to {size - 1}; "
            "give ids of this model"
        )
