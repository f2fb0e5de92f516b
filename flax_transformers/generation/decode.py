"""Greedy decoding and sampling with a cache of keys and values.

``generate`` is for decoders. The model needs the methods ``empty_cache(batch, slots)``,
``hidden_states(ids, attention_mask, position_ids=..., cache=...)``, whose result has the updated
``cache``, and ``unembed(hidden)``. The loop, ``continue_text``, does not use the model: it takes
the logits of the first new token and a function for each later one, and so also serves
encoder-decoders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.generation.logits import History, processed
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings
from flax_transformers.models.heads import last_token
from flax_transformers.ranges import Ranges

logger = logging.getLogger(__name__)

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""``step(ids, count, cache) -> (logits, cache)``: takes the newest token of each row, int32 [B],
and gives the logits of the next one, float32 [B, V]. ``count``, an int32 scalar, is the number of
new tokens before ``ids``."""


_TOP_K = 50
"""Default of ``top_k`` in transformers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits; greedily at temperature 0.

    Logits are divided by ``temperature``, then restricted to the ``top_k`` most likely tokens, and
    to the smallest set of these that has probability ``top_p`` (arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    RANGES: ClassVar[Ranges] = {
        "temperature": ranges.numbers(0, 1e6),
        "top_k": ranges.ENTRIES,
        "top_p": ranges.numbers(0, 1, above=True),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise UserError("top_k and top_p apply to sampling only; set a temperature, such as 1")

    def log_probabilities(self, logits_BV: jax.Array) -> jax.Array:
        """Unnormalised log-probabilities of the sampled tokens, float32 [B, V]."""
        # Subtract the maximum first, to avoid overflow at low temperatures.
        logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            least_B1 = jax.lax.top_k(logits_BV, self.top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        if self.top_p is not None and self.top_p < 1.0:
            sorted_BV = -jnp.sort(-logits_BV, axis=-1)
            probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
            kept_BV = jnp.where(before_BV < self.top_p, sorted_BV, jnp.inf)
            least_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
            logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        return logits_BV

    def choose(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """One token for each row, int32 [B]. Padded vocabulary entries have the lowest finite logit
        and are never chosen."""
        if self.temperature == 0.0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        chosen_B = jax.random.categorical(key, self.log_probabilities(logits_BV), axis=-1)
        return chosen_B.astype(jnp.int32)


class Endings(NamedTuple):
    """The tokens ``eos`` int32 [n] that end a row, and ``pad``, an int32 scalar, that follows."""

    eos: jax.Array
    pad: jax.Array

    @classmethod
    def of(cls, eos_id: int | Sequence[int], pad_id: int) -> Endings:
        """A row ends with any of ``eos_id``."""
        return cls(jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)), jnp.int32(pad_id))


def generate(
    model: nn.Module,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    settings: GenerationSettings | None = None,
) -> jax.Array:
    """Continue prompts with a causal model: new tokens int32 [B, max_new_tokens].

    ``input_ids`` int32 [B, T] and ``attention_mask`` [B, T], 1 at tokens; padding on either side
    does not change the result. A row ends with any of ``eos_id`` and is padded with ``pad_id``; the
    loop ends when all rows have ended. Sampling (see ``Sampling``) needs a ``key``. Compiled once
    for each shape, model and ``Sampling``.

    ``settings`` default to those of the model's config, which come from the folder it was loaded
    from; arguments override them. A warning names settings that are not implemented.

    Raises UserError for settings out of range, a prompt without tokens, and more tokens than the
    model has positions for.
    """
    require_writer(model)
    settings = settings_of(model) if settings is None else settings
    sampling = sampling_of(settings, temperature, top_k, top_p, key)
    ids_BT, mask_BT = ids_and_mask(input_ids, attention_mask)
    lengths = mask_BT.sum(axis=1)
    max_new_tokens = new_tokens_of(settings, max_new_tokens, int(lengths.max()))
    key = require_settings(max_new_tokens, sampling, key)
    if lengths.min() < 1:
        raise UserError("a prompt has no tokens; give at least one, such as the start token")
    longest = int(lengths.max()) + max_new_tokens
    require_positions(model, longest, f"{longest} tokens of prompt and text")
    return write_text(
        model,
        params,
        jnp.asarray(ids_BT),
        jnp.asarray(mask_BT),
        endings_of(model, settings, eos_id, pad_id),
        key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        settings=settings,
    )


def settings_of(model: Any) -> GenerationSettings:
    """The generation settings of a model's config."""
    settings: GenerationSettings = getattr(model.config, "generation", NO_SETTINGS)
    return settings


def endings_of(
    model: Any,
    settings: GenerationSettings,
    eos_id: int | Sequence[int] | None,
    pad_id: int | None,
) -> Endings:
    """The given ids, with defaults from the settings."""
    if pad_id is None:
        known = settings.pad_token_id
        pad_id = max(model.config.pad_id, 0) if known is None else known
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


def sampling_of(
    settings: GenerationSettings,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
) -> Sampling:
    """Each of the three as given, else from the settings, else the default of transformers.

    Without a temperature, tokens are sampled if the settings have ``do_sample`` and there is a key;
    otherwise decoding is greedy. A warning names the settings that are not implemented.
    """
    draws = bool(settings.do_sample)
    _warn_of_settings(settings, drawing_without_key=draws and key is None)
    if temperature is None and draws and key is not None:
        temperature = 1.0 if settings.temperature is None else settings.temperature
    if temperature:  # otherwise a given top_k or top_p is refused
        if top_k is None:
            top_k = _TOP_K if settings.top_k is None else settings.top_k or None
        top_p = settings.top_p if top_p is None else top_p
    return Sampling(temperature=temperature or 0.0, top_k=top_k, top_p=top_p)


@lru_cache(maxsize=64)
def _warn_of_settings(settings: GenerationSettings, *, drawing_without_key: bool) -> None:
    """Log, once, the settings that have no effect."""
    ignored = [f"{name} {value!r}" for name, value in settings.not_obeyed.items()]
    if drawing_without_key:
        ignored.append("do_sample True, because no random key is given")
    if ignored:
        logger.warning("generation settings without effect: %s", "; ".join(ignored))


def require_settings(max_new_tokens: int, sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """The random key, or an arbitrary one for greedy decoding. Raises UserError without a key for
    sampling, and for less than one new token."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if sampling.temperature > 0.0 and key is None:
        raise UserError("sampling needs a random key; give key=jax.random.key(seed)")
    return jax.random.key(0) if key is None else key


def ids_and_mask(
    input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both as int32 [B, T]; the default mask is all ones."""
    ids_BT = np.asarray(input_ids, np.int32)
    if attention_mask is None:
        return ids_BT, np.ones_like(ids_BT)
    return ids_BT, np.asarray(attention_mask, np.int32)


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


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "sampling", "settings"))
def write_text(
    model: Any,
    params: Mapping[str, Any],
    ids_BT: jax.Array,
    mask_BT: jax.Array,
    endings: Endings,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    settings: GenerationSettings = NO_SETTINGS,
) -> jax.Array:
    """The compiled part of ``generate``, for checked arguments; plans compile it without data."""
    batch, length = ids_BT.shape
    apply = partial(model.apply, {"params": params})
    cache = model.empty_cache(batch, length + max_new_tokens)
    # Positions count tokens only, on whichever side the padding is.
    position_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
    states = apply(ids_BT, mask_BT, position_ids=position_BT, cache=cache, method="hidden_states")
    index_B11 = last_token(mask_BT)[:, None, None]
    last_B1D = jnp.take_along_axis(states.last_hidden_state, index_B11, axis=1)
    logits_BV = apply(last_B1D, method="unembed")[:, 0]
    first_B = position_BT[:, -1] + 1

    def step(ids_B: jax.Array, count: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        states = apply(
            ids_B[:, None],
            position_ids=(first_B + count)[:, None],
            cache=cache,
            method="hidden_states",
        )
        return apply(states.last_hidden_state, method="unembed")[:, 0], states.cache

    return continue_text(
        step,
        states.cache,
        logits_BV,
        endings,
        key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rules=Rules.of(settings, ids_BT, mask_BT, max_new_tokens, model.config.vocab_size),
    )


class Rules(NamedTuple):
    """Generation settings that change logits, and the tokens that they depend on."""

    history: History
    settings: GenerationSettings
    vocab_size: int

    @classmethod
    def of(
        cls,
        settings: GenerationSettings,
        ids_BT: jax.Array,
        mask_BT: jax.Array,
        max_new_tokens: int,
        vocab_size: int,
    ) -> Rules | None:
        """The rules after prompts; None if the settings do not change logits."""
        if not settings.changes_logits:
            return None
        return cls(History.of(ids_BT, mask_BT, max_new_tokens), settings, vocab_size)


def continue_text(
    step: Step,
    cache: Any,
    logits_BV: jax.Array,
    endings: Endings,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    rules: Rules | None = None,
) -> jax.Array:
    """New tokens int32 [B, max_new_tokens], the first chosen from ``logits_BV`` float32 [B, V].

    For use inside jit. ``cache`` is any pytree that ``step`` updates.
    """
    batch = logits_BV.shape[0]
    tokens_BM = jnp.full((batch, max_new_tokens), endings.pad, jnp.int32)
    ended_B = jnp.zeros((batch,), bool)
    history = None if rules is None else rules.history

    def write(
        tokens_BM: jax.Array,
        ended_B: jax.Array,
        history: History | None,
        logits_BV: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, jax.Array, History | None]:
        if rules is not None and history is not None:
            logits_BV = processed(
                logits_BV,
                history,
                rules.settings,
                eos=endings.eos,
                vocab_size=rules.vocab_size,
                max_new_tokens=max_new_tokens,
            )
        ids_B = sampling.choose(logits_BV, jax.random.fold_in(key, count))
        ids_B = jnp.where(ended_B, endings.pad, ids_B)
        ends_B = jnp.any(ids_B[:, None] == endings.eos[None, :], axis=1)
        history = None if history is None else history.append(ids_B)
        return tokens_BM.at[:, count].set(ids_B), ended_B | ends_B, history

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        count, _, ended_B, _, _ = state
        return (count < max_new_tokens) & ~jnp.all(ended_B)

    def one_more(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, tokens_BM, ended_B, history, cache = state
        logits_BV, cache = step(tokens_BM[:, count - 1], count - 1, cache)
        return (count + 1, *write(tokens_BM, ended_B, history, logits_BV, count), cache)

    first = write(tokens_BM, ended_B, history, logits_BV, jnp.int32(0))
    state = jax.lax.while_loop(unfinished, one_more, (jnp.int32(1), *first, cache))
    tokens_BM = state[1]
    if jax.sharding.get_abstract_mesh().empty:
        return tokens_BM
    return jax.lax.with_sharding_constraint(tokens_BM, PartitionSpec())  # replicated
