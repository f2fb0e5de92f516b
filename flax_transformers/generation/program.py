"""The compiled part of text generation, for decoders and encoder-decoders.

The model needs the methods ``empty_cache(batch, slots)``, ``hidden_states(..., cache=...)``, whose
result has the updated ``cache``, and ``unembed(hidden)``. B rows, K beams, T tokens of a prompt or
source, P of a decoder's start, M columns for new tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.generation.beams import Beams
from flax_transformers.generation.logits import History
from flax_transformers.generation.loop import Rules, Step, TextLimits, advance, replicate
from flax_transformers.generation.sampling import Sampling
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings
from flax_transformers.models.heads import last_token, take_token
from flax_transformers.models.layers.stack import are_separate, separate_layers, separate_leaves

Streamer = Callable[[np.ndarray], None]
"""Called with the new tokens int32 [B] of each step. Rows that have ended get padding."""


class GenerationRequest(NamedTuple):
    """What to generate from. ``ids_BT`` and ``mask_BT`` int32: prompts or, if there is a
    ``start_P`` int32 of the decoder, sources. ``forced``: the first new token, an int32 scalar."""

    ids_BT: jax.Array
    mask_BT: jax.Array
    limits: TextLimits
    key: jax.Array
    start_P: jax.Array | None = None
    forced: jax.Array | None = None


class Settings(NamedTuple):
    """What a program is compiled for, besides shapes. ``columns``: for new tokens, M."""

    columns: int
    choice: Sampling | Beams
    generation: GenerationSettings = NO_SETTINGS


def takes_separate_layers(devices: Collection[jax.Device]) -> bool:
    """Whether programs for these devices take the parameters of ``stack.separate_layers``."""
    return [device.platform for device in devices] == ["cpu"]


def arranged(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters as programs for their devices take them."""
    leaf = jax.tree.leaves(params)[0]
    devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else jax.devices()[:1]
    if are_separate(params) or not takes_separate_layers(devices):
        return params
    return _separate(params)


_separate = jax.jit(separate_layers)


@partial(jax.jit, static_argnums=0, static_argnames="settings")
def write(
    model: Any, params: Mapping[str, Any], request: GenerationRequest, *, settings: Settings
) -> jax.Array:
    """New tokens int32 [B, M] of a checked request."""
    state, cache = _begin(model, params, request, settings)
    rules, step = _rules(model, request, settings), _step(model, params, settings)
    state, _ = advance(step, state, cache, settings.choice, rules, request.limits.max_new_tokens)
    return replicate(settings.choice.result(state)[:, -settings.columns :])


def stream(
    model: Any,
    params: Mapping[str, Any],
    request: GenerationRequest,
    streamer: Streamer,
    *,
    settings: Settings,
) -> jax.Array:
    """As ``write``, token by token. For sampling only: beams change places until the end."""
    state, cache = begin(model, params, request, settings=settings)
    while True:
        end = int(state.history.end)
        streamer(np.asarray(state.history.ids_BL[:, end - 1]))
        state, cache = go_on(model, params, request, state, cache, settings=settings)
        if int(state.history.end) == end:
            return settings.choice.result(state)[:, -settings.columns :]


@partial(jax.jit, static_argnums=0, static_argnames="settings")
def begin(
    model: Any, params: Mapping[str, Any], request: GenerationRequest, *, settings: Settings
) -> tuple[Any, Any]:
    """The state after the first new token, and the cache."""
    return _begin(model, params, request, settings)


@partial(jax.jit, static_argnums=0, static_argnames="settings", donate_argnums=(3, 4))
def go_on(
    model: Any,
    params: Mapping[str, Any],
    request: GenerationRequest,
    state: Any,
    cache: Any,
    *,
    settings: Settings,
) -> tuple[Any, Any]:
    """State and cache after one more token, unchanged at the end of all texts."""
    rules, step = _rules(model, request, settings), _step(model, params, settings)
    return advance(step, state, cache, settings.choice, rules, state.history.written + 1)


def _begin(
    model: Any, params: Mapping[str, Any], request: GenerationRequest, settings: Settings
) -> tuple[Any, Any]:
    read = _read_prompts if request.start_P is None else _read_sources
    logits_BV, cache, ids_BP, mask_BP = read(model, params, request, settings)
    if request.forced is not None:
        chosen_V = jnp.arange(logits_BV.shape[-1]) == request.forced
        logits_BV = jnp.broadcast_to(jnp.where(chosen_V, 0.0, -jnp.inf), logits_BV.shape)
    history = History.of(ids_BP, mask_BP, settings.columns, request.limits.endings.pad)
    rules = _rules(model, request, settings)
    return settings.choice.start(logits_BV, history, rules), cache


def _read_prompts(
    model: Any, params: Mapping[str, Any], request: GenerationRequest, settings: Settings
) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
    """Logits [B, V] after prompts, the cache with slots for new tokens, and the prompts."""
    ids_BT, mask_BT = request.ids_BT, request.mask_BT
    batch, length = ids_BT.shape
    apply = partial(model.apply, {"params": params})
    inputs = {"position_ids": _positions(mask_BT)}
    if settings.generation.bidirectional_prompt:
        inputs["prefix_mask"] = mask_BT
    states = apply(
        ids_BT,
        mask_BT,
        **inputs,
        cache=_empty_cache(model, params, batch, length + _new_slots(settings)),
        method="hidden_states",
    )
    last_B1D = take_token(states.last_hidden_state, last_token(mask_BT))
    return apply(last_B1D, method="unembed")[:, 0], states.cache, ids_BT, mask_BT


def _read_sources(
    model: Any, params: Mapping[str, Any], request: GenerationRequest, settings: Settings
) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
    """The same after sources and the start of the targets, which take the prompts' place."""
    assert request.start_P is not None
    batch, prefix = request.ids_BT.shape[0], request.start_P.shape[0]
    start_BP = jnp.broadcast_to(request.start_P[None, :], (batch, prefix))
    apply = partial(model.apply, {"params": params})
    states = apply(
        request.ids_BT,
        request.mask_BT,
        position_ids=_positions(request.mask_BT),
        decoder_input_ids=start_BP,
        cache=_empty_cache(model, params, batch, prefix + _new_slots(settings)),
        method="hidden_states",
    )
    logits_BV = apply(states.last_hidden_state[:, -1:], method="unembed")[:, 0]
    return logits_BV, states.cache, start_BP, jnp.ones_like(start_BP)


def _step(model: Any, params: Mapping[str, Any], settings: Settings) -> Step:
    """One more token of each beam."""
    apply = partial(model.apply, {"params": params})
    decoder = "decoder_" if "decoder_input_ids" in model.inputs else ""

    def step(
        ids_BK: jax.Array, position_BK: jax.Array, ancestors_BKL: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, Any]:
        if ancestors_BKL is not None:
            slots = cache.segments.shape[1]
            visible = _visible(ancestors_BKL[:, :, -settings.columns :], slots)
            cache = cache.replace(visible=visible)
        inputs = {f"{decoder}input_ids": ids_BK, f"{decoder}position_ids": position_BK}
        states = apply(**inputs, cache=cache, method="hidden_states")
        return apply(states.last_hidden_state, method="unembed"), states.cache

    return step


def _visible(ancestors_BKM: jax.Array, slots: int) -> jax.Array:
    """The slots of each beam's text, bool [B, K, slots]: all those of the prompt, which come first,
    and one of the K slots of each new token."""
    batch, beams, columns = ancestors_BKM.shape
    own_BKMK = ancestors_BKM[..., None] == jnp.arange(beams)[None, None, None, :]
    own_BKS = own_BKMK.reshape(batch, beams, columns * beams)
    prompt = slots - columns * beams
    return jnp.pad(own_BKS, ((0, 0), (0, 0), (prompt, 0)), constant_values=True)


def _empty_cache(model: Any, params: Mapping[str, Any], batch: int, slots: int) -> Any:
    cache = model.empty_cache(batch, slots)
    if are_separate(params):
        cache = cache.replace(layers=separate_leaves(cache.layers))
    return cache


def _new_slots(settings: Settings) -> int:
    """Slots of the cache for new tokens: one for each beam of each."""
    choice = settings.choice
    return settings.columns * (choice.num_beams if isinstance(choice, Beams) else 1)


def _rules(model: Any, request: GenerationRequest, settings: Settings) -> Rules:
    config = getattr(model.config, "decoder", model.config)
    return Rules(request.limits, request.key, config.vocab_size, settings.generation)


def _positions(mask_BT: jax.Array) -> jax.Array:
    """Position ids, which count tokens only, on whichever side the padding is."""
    return jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
