"""Greedy decoding and sampling with encoder-decoders.

The encoder runs once, and the keys and values of cross-attention stay in the cache. The loop is
that of ``decode``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_transformers.errors import UserError
from flax_transformers.generation.decode import (
    Endings,
    Rules,
    Sampling,
    continue_text,
    endings_of,
    ids_and_mask,
    new_tokens_of,
    require_positions,
    require_settings,
    sampling_of,
    settings_of,
)
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings


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
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    settings: GenerationSettings | None = None,
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
    sampling = sampling_of(settings, temperature, top_k, top_p, key)
    ids_BS, mask_BS = ids_and_mask(input_ids, attention_mask)
    start = tuple(start_ids) or (_first_id(model, settings),)
    max_new_tokens = new_tokens_of(settings, max_new_tokens, len(start))
    key = require_settings(max_new_tokens, sampling, key)
    _check_ids(model, start if forced_first_id is None else (*start, forced_first_id))
    # An empty batch has no longest source.
    source, target = int(mask_BS.sum(axis=1).max(initial=0)), len(start) + max_new_tokens
    both = f"{source} tokens of source and {target} of target"
    require_positions(model, max(source, target), both)
    return write_target(
        model,
        params,
        jnp.asarray(ids_BS),
        jnp.asarray(mask_BS),
        jnp.asarray(start, jnp.int32),
        None if forced_first_id is None else jnp.int32(forced_first_id),
        endings_of(model, settings, eos_id, pad_id),
        key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        settings=settings,
    )


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


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "sampling", "settings"))
def write_target(
    model: Any,
    params: Mapping[str, Any],
    ids_BS: jax.Array,
    mask_BS: jax.Array,
    start: jax.Array,
    forced: jax.Array | None,
    endings: Endings,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    settings: GenerationSettings = NO_SETTINGS,
) -> jax.Array:
    """The compiled part of ``generate_target``, for checked arguments."""
    batch, prefix = ids_BS.shape[0], start.shape[0]
    start_BT = jnp.broadcast_to(start[None, :], (batch, prefix))
    apply = partial(model.apply, {"params": params})
    states = apply(
        ids_BS,
        mask_BS,
        # Positions count tokens only, on whichever side the padding is.
        position_ids=jnp.maximum(jnp.cumsum(mask_BS, axis=1) - 1, 0),
        decoder_input_ids=start_BT,
        cache=model.empty_cache(batch, prefix + max_new_tokens),
        method="hidden_states",
    )
    logits_BV = apply(states.last_hidden_state[:, -1:], method="unembed")[:, 0]
    if forced is not None:
        chosen_V = jnp.arange(logits_BV.shape[-1]) == forced
        logits_BV = jnp.broadcast_to(jnp.where(chosen_V, 0.0, -jnp.inf), logits_BV.shape)

    def step(ids_B: jax.Array, count: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        states = apply(decoder_input_ids=ids_B[:, None], cache=cache, method="hidden_states")
        return apply(states.last_hidden_state, method="unembed")[:, 0], states.cache

    return continue_text(
        step,
        states.cache,
        logits_BV,
        endings,
        key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rules=Rules.of(
            settings,
            start_BT,
            jnp.ones_like(start_BT),
            max_new_tokens,
            model.config.decoder.vocab_size,
        ),
    )
