"""Greedy decoding and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.generation.logits import History
from flax_transformers.generation.loop import Rules


class Drawn(NamedTuple):
    """The state of sampling. ``ended_B``: rows that have ended; ``progress_BN``: progress through
    stop strings, if any."""

    history: History
    ended_B: jax.Array
    progress_BN: jax.Array | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits; greedily at temperature 0.

    Logits are divided by ``temperature``, then restricted to the ``top_k`` most likely tokens, to
    the smallest set of these that has probability ``top_p`` (arXiv:1904.09751), and to those with
    at least ``min_p`` times the probability of the most likely one (arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    RANGES: ClassVar[ranges.Ranges] = {
        "temperature": ranges.numbers(0, 1e6),
        "top_k": ranges.ENTRIES,
        "top_p": ranges.numbers(0, 1, above=True),
        "min_p": ranges.SHARE,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "")
        filters = (self.top_k, self.top_p, self.min_p)
        if not self.temperature and any(given is not None for given in filters):
            raise UserError(
                "top_k, top_p and min_p apply to sampling only; set a temperature, such as 1"
            )

    def log_probabilities(self, logits_BV: jax.Array) -> jax.Array:
        """Unnormalised log-probabilities of the sampled tokens, float32 [B, V]."""
        # Subtract the maximum first, to avoid overflow at low temperatures.
        logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = logits_BV / self.temperature
        ranked_BV = None
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            ranked_BV = jax.lax.top_k(logits_BV, self.top_k)[0]
            logits_BV = _at_least(logits_BV, ranked_BV[:, -1:])
        if self.top_p is not None and self.top_p < 1.0:
            if ranked_BV is None:
                ranked_BV = -jnp.sort(-logits_BV, axis=-1)
            total_B1 = jnp.sum(jnp.exp(logits_BV), axis=-1, keepdims=True)
            probability_BV = jnp.exp(ranked_BV) / total_B1
            before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
            kept_BV = jnp.where(before_BV < self.top_p, ranked_BV, jnp.inf)
            logits_BV = _at_least(logits_BV, jnp.min(kept_BV, axis=-1, keepdims=True))
        if self.min_p:
            logits_BV = _at_least(logits_BV, jnp.log(jnp.float32(self.min_p)))  # the maximum is 0
        return logits_BV

    def choose(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """One token for each row, int32 [B]. Padded vocabulary entries have the lowest finite logit
        and are never chosen."""
        if self.temperature == 0.0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        chosen_B = jax.random.categorical(key, self.log_probabilities(logits_BV), axis=-1)
        return chosen_B.astype(jnp.int32)

    def start(self, logits_BV: jax.Array, history: History, rules: Rules) -> Drawn:
        stops, ended_B = rules.limits.stops, jnp.zeros(logits_BV.shape[:1], bool)
        progress_BN = None if stops is None else stops.start
        return self.advance(Drawn(history, ended_B, progress_BN), logits_BV[:, None], rules)

    def advance(self, state: Drawn, logits_BKV: jax.Array, rules: Rules) -> Drawn:
        history, ended_B, progress_BN = state
        logits_BV = rules.processed(logits_BKV[:, 0], history)
        ids_B = self.choose(logits_BV, jax.random.fold_in(rules.key, history.written))
        ids_B = jnp.where(ended_B, rules.limits.endings.pad, ids_B)
        ends_B, progress_BN = rules.ends(ids_B, progress_BN)
        return Drawn(history.append(ids_B), ended_B | ends_B, progress_BN)

    def unfinished(self, state: Drawn, rules: Rules) -> jax.Array:
        return (state.history.written < rules.limits.max_new_tokens) & ~jnp.all(state.ended_B)

    def ancestors(self, state: Drawn) -> None:
        return None

    def result(self, state: Drawn) -> jax.Array:
        return state.history.ids_BL


def _at_least(logits_BV: jax.Array, least: jax.Array) -> jax.Array:
    """The logits without those below ``least``."""
    return jnp.where(logits_BV < least, -jnp.inf, logits_BV)
