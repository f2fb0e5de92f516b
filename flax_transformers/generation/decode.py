"""Text token by token: greedy decoding and sampling over a cache of keys and values.

``generate`` serves decoders. What it asks of a model is ``empty_cache(batch, slots)``,
``hidden_states(ids, attention_mask, position_ids=..., cache=...)`` with the renewed ``cache`` in
its result, and ``unembed(hidden)``. The loop itself, ``continue_text``, sees no model: it takes the
logits of the first new token and a function for each further one, so that a model whose cache
starts in another way (with the states of an encoder) brings only that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.models.heads import last_token
from flax_transformers.ranges import Ranges

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""``step(ids, count, cache) -> (logits, cache)``: the new token int32 [B] of each row goes in, the
logits float32 [B, V] of the one after it come out. ``count``, an int32 scalar, is how many new
tokens came before: the token's position is that many after the first new one."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits; greedily at temperature 0.

    Logits are divided by ``temperature``; then only the ``top_k`` likeliest tokens remain, and of
    these the fewest that together have a probability of ``top_p`` (arXiv:1904.09751).
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
            raise UserError("top_k and top_p choose among samples; set a temperature, such as 1")

    def log_probabilities(self, logits_BV: jax.Array) -> jax.Array:
        """Logarithms, not normalised, of what tokens are drawn by, float32 [B, V]."""
        # The largest is taken off first: at low temperatures it would overflow.
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
        """One token of each row, int32 [B]. Padded vocabulary entries have the lowest logits there
        are, and are never chosen."""
        if self.temperature == 0.0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        chosen_B = jax.random.categorical(key, self.log_probabilities(logits_BV), axis=-1)
        return chosen_B.astype(jnp.int32)


class Endings(NamedTuple):
    """When a row ends, and what fills it up then: ``eos`` int32 [n], ``pad`` an int32 scalar."""

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
    max_new_tokens: int,
    eos_id: int | Sequence[int] = (),
    pad_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What a causal model writes after its prompts: new tokens int32 [B, max_new_tokens].

    ``input_ids`` int32 [B, T] and ``attention_mask`` [B, T], 1 at tokens: prompts may be padded on
    either side, and go on as if they were not. A row ends with any of ``eos_id`` and is filled up
    with ``pad_id``; all stops when all rows have ended. For sampling (see ``Sampling``) a ``key``
    is needed. Compiled once for each shape, model and way of sampling.

    Raises UserError for settings out of range, a prompt without tokens, and more tokens than the
    model has positions for.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    key = require_settings(max_new_tokens, sampling, key)
    require_writer(model)
    ids_BT, mask_BT = ids_and_mask(input_ids, attention_mask)
    lengths = mask_BT.sum(axis=1)
    if lengths.min() < 1:
        raise UserError("a prompt has no tokens; give at least one, such as the start of a text")
    longest = int(lengths.max()) + max_new_tokens
    require_positions(model, longest, f"{longest} tokens of prompt and text")
    return write_text(
        model,
        params,
        jnp.asarray(ids_BT),
        jnp.asarray(mask_BT),
        Endings.of(eos_id, pad_id),
        key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )


def require_settings(max_new_tokens: int, sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """The key to sample with, any where nothing is drawn. Raises UserError for what cannot be."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if sampling.temperature > 0.0 and key is None:
        raise UserError("sampling needs a random key; give key=jax.random.key(seed)")
    return jax.random.key(0) if key is None else key


def ids_and_mask(
    input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both as int32 [B, T]; without a mask all are tokens."""
    ids_BT = np.asarray(input_ids, np.int32)
    if attention_mask is None:
        return ids_BT, np.ones_like(ids_BT)
    return ids_BT, np.asarray(attention_mask, np.int32)


def require_positions(model: Any, longest: int, what: str) -> None:
    """Raises UserError, which begins with ``what``, for more tokens than there are positions."""
    limit = model.config.max_positions
    if model.config.positions != "none" and limit is not None and longest > limit:
        raise UserError(
            f"{what} are more than the model's {limit} positions; shorten what is given to it or "
            "ask for fewer new tokens"
        )


def require_writer(model: Any) -> None:
    """Raises UserError for a model that ``generate`` cannot use."""
    if not hasattr(model, "unembed") or not getattr(model.config, "causal", False):
        raise UserError(
            f"{model.config.architecture} does not write text; use a causal model with a "
            "language-modelling head"
        )


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "sampling"))
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
) -> jax.Array:
    """The program of ``generate``, for what it has checked; compiled without data by plans."""
    batch, length = ids_BT.shape
    apply = partial(model.apply, {"params": params})
    cache = model.empty_cache(batch, length + max_new_tokens)
    # Counted over tokens alone, whichever side the padding is on.
    position_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
    states = apply(ids_BT, mask_BT, position_ids=position_BT, cache=cache, method="hidden_states")
    place_B11 = last_token(mask_BT)[:, None, None]
    last_B1D = jnp.take_along_axis(states.last_hidden_state, place_B11, axis=1)
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
    )


def continue_text(
    step: Step,
    cache: Any,
    logits_BV: jax.Array,
    endings: Endings,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> jax.Array:
    """New tokens int32 [B, max_new_tokens], the first chosen by ``logits_BV`` float32 [B, V].

    To be called under jit. ``cache`` is any pytree that ``step`` renews.
    """
    batch = logits_BV.shape[0]
    tokens_BM = jnp.full((batch, max_new_tokens), endings.pad, jnp.int32)
    ended_B = jnp.zeros((batch,), bool)

    def write(
        tokens_BM: jax.Array, ended_B: jax.Array, logits_BV: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        ids_B = sampling.choose(logits_BV, jax.random.fold_in(key, count))
        ids_B = jnp.where(ended_B, endings.pad, ids_B)
        ends_B = jnp.any(ids_B[:, None] == endings.eos[None, :], axis=1)
        return tokens_BM.at[:, count].set(ids_B), ended_B | ends_B

    def going_on(state: tuple[Any, ...]) -> jax.Array:
        count, _, ended_B, _ = state
        return (count < max_new_tokens) & ~jnp.all(ended_B)

    def one_more(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, tokens_BM, ended_B, cache = state
        logits_BV, cache = step(tokens_BM[:, count - 1], count - 1, cache)
        return (count + 1, *write(tokens_BM, ended_B, logits_BV, count), cache)

    first = write(tokens_BM, ended_B, logits_BV, jnp.int32(0))
    _, tokens_BM, _, _ = jax.lax.while_loop(going_on, one_more, (jnp.int32(1), *first, cache))
    if jax.sharding.get_abstract_mesh().empty:
        return tokens_BM
    return jax.lax.with_sharding_constraint(tokens_BM, PartitionSpec())  # whole on every process
