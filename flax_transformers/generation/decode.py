"""Text generation with decoders, and the checks of it that encoder-decoders share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_transformers.errors import UserError
from flax_transformers.generation import program
from flax_transformers.generation.beams import Beams
from flax_transformers.generation.buckets import bucket, padded_to_bucket
from flax_transformers.generation.choices import choice_of, settings_of
from flax_transformers.generation.loop import Endings, TextLimits
from flax_transformers.generation.program import GenerationRequest, Settings, Streamer
from flax_transformers.generation.sampling import Sampling
from flax_transformers.generation.stop_strings import StopStrings
from flax_transformers.models.generation_settings import GenerationSettings


def generate(
    model: nn.Module,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int | None = None,
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
    """Continue prompts with a causal model: new tokens int32 [B, max_new_tokens].

    ``input_ids`` int32 [B, T] and ``attention_mask`` [B, T], 1 at tokens; padding on either side
    does not change the result. A row ends with any of ``eos_id`` or with one of ``stops``, and is
    padded with ``pad_id``; the loop ends when all rows have ended. ``streamer`` gets the tokens of
    each step as they are chosen.

    ``choice`` is ``Beams``, or ``Sampling``, which needs a ``key`` unless it is greedy. By default
    it follows from the arguments and the settings (``choices.choice_of``). ``settings`` default to
    those of the model's config, which come from the folder it was loaded from; arguments override
    them. A warning names settings that are not implemented.

    Compiled once for each model, choice, settings, batch size and bucket of lengths
    (``buckets.bucket``).

    Raises UserError for settings out of range, a prompt without tokens, and more tokens than the
    model has positions for.
    """
    require_writer(model)
    settings = settings_of(model) if settings is None else settings
    if choice is None:
        choice = choice_of(settings, key, temperature=temperature, top_k=top_k, top_p=top_p)
    ids_BT, mask_BT = ids_and_mask(model, input_ids, attention_mask)
    lengths = mask_BT.sum(axis=1)
    max_new_tokens, key = check_prompts(model, lengths, max_new_tokens, choice, key, settings)
    endings = endings_of(model, settings, eos_id, pad_id)
    ids_BT, mask_BT = padded_to_bucket(ids_BT, mask_BT, model.config.filler_id, left=True)
    limits = TextLimits(endings, jnp.int32(max_new_tokens), stops)
    request = GenerationRequest(jnp.asarray(ids_BT), jnp.asarray(mask_BT), limits, key)
    return run(model, params, request, choice, settings, streamer)


def check_prompts(
    model: Any,
    lengths: Sequence[int] | np.ndarray,
    max_new_tokens: int | None,
    choice: Sampling | Beams,
    key: jax.Array | None,
    settings: GenerationSettings,
) -> tuple[int, jax.Array]:
    """The number of new tokens after prompts of these numbers of tokens, and the random key.

    Needs no parameters. Raises UserError where ``generate`` does.
    """
    longest = max(lengths)
    max_new_tokens = new_tokens_of(settings, max_new_tokens, int(longest))
    key = require_settings(max_new_tokens, choice, key)
    if min(lengths) < 1:
        raise UserError("a prompt has no tokens; give at least one, such as the start token")
    total = int(longest) + max_new_tokens
    require_positions(model, total, f"{total} tokens of prompt and text")
    return max_new_tokens, key


def run(
    model: nn.Module,
    params: Mapping[str, Any],
    request: GenerationRequest,
    choice: Sampling | Beams,
    settings: GenerationSettings,
    streamer: Streamer | None,
) -> jax.Array:
    """New tokens int32 [B, max_new_tokens] of a checked request.

    Raises UserError for a streamer with beam search.
    """
    new_tokens = int(request.limits.max_new_tokens)
    params = program.arranged(params)
    compiled = Settings(bucket(new_tokens), choice, settings)
    if streamer is None:
        tokens_BM = program.write(model, params, request, settings=compiled)
    elif isinstance(choice, Beams):
        raise UserError("beam search has no text before its end; leave out the streamer")
    else:
        tokens_BM = program.stream(model, params, request, streamer, settings=compiled)
    return tokens_BM[:, :new_tokens]


def endings_of(
    model: Any,
    settings: GenerationSettings,
    eos_id: int | Sequence[int] | None,
    pad_id: int | None,
) -> Endings:
    """The given ids, with defaults from the settings."""
    if pad_id is None:
        known = settings.pad_token_id
        pad_id = model.config.filler_id if known is None else known
    return Endings.of(settings.eos_ids if eos_id is None else eos_id, pad_id)


def new_tokens_of(settings: GenerationSettings, given: int | None, prompt: int) -> int:
    """The number of new tokens after a prompt of ``prompt`` tokens: given, or from the settings.

    Raises UserError if the settings allow none, or do not limit them.
    """
    if given is not None:
        return given
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    if settings.max_length is None:
        raise UserError("the model's generation settings have no length limit; give max_new_tokens")
    if settings.max_length <= prompt:
        raise UserError(
            f"the prompt has {prompt} tokens, and the model's max_length is {settings.max_length}; "
            "give max_new_tokens"
        )
    return settings.max_length - prompt


def require_settings(
    max_new_tokens: int, choice: Sampling | Beams, key: jax.Array | None
) -> jax.Array:
    """The random key, or an arbitrary one where nothing is random. Raises UserError without a key
    for sampling, and for less than one new token."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if isinstance(choice, Sampling) and choice.temperature > 0.0 and key is None:
        raise UserError("sampling needs a random key; give key=jax.random.key(seed)")
    return jax.random.key(0) if key is None else key


def ids_and_mask(
    model: Any, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both as int32 [B, T]; the default mask is all ones. Padding becomes an id of the model, which
    that of a tokenizer need not be."""
    ids_BT = np.asarray(input_ids, np.int32)
    if attention_mask is None:
        return ids_BT, np.ones_like(ids_BT)
    mask_BT = np.asarray(attention_mask, np.int32)
    return np.where(mask_BT == 0, np.int32(model.config.filler_id), ids_BT), mask_BT


def require_positions(model: Any, longest: int, what: str) -> None:
    """Raises UserError, beginning with ``what``, for more tokens than the model has positions."""
    limit = model.config.max_positions
    if model.config.positions != "none" and limit is not None and longest > limit:
        raise UserError(
            f"{what} are more than the model's {limit} positions; shorten the input or ask for "
            "fewer new tokens"
        )


def require_writer(model: Any) -> None:
    """Raises UserError for a model that ``generate`` cannot use."""
    if not hasattr(model, "unembed") or not getattr(model.config, "causal", False):
        raise UserError(
            f"{model.config.architecture} does not generate text; use a causal model with a "
            "language-modelling head"
        )
