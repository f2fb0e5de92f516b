"""The loop of decoding, for any model and any choice of tokens.

A ``Choice`` says how tokens are chosen: ``Sampling``, which includes greedy decoding, or ``Beams``.
The loop does not use the model: it takes the logits of the first new token and a ``Step`` for each
later one, and so serves decoders and encoder-decoders. B rows have K beams each, one without beam
search; R rows of beams are B * K; L columns hold a prompt and its new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_transformers.generation.logits import History, processed
from flax_transformers.generation.stop_strings import StopStrings
from flax_transformers.models.generation_settings import NO_SETTINGS, GenerationSettings

Step = Callable[[jax.Array, jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]
"""``step(ids, positions, ancestors, cache) -> (logits, cache)``: takes the newest token of each
beam and its position, int32 [B, K], and gives the logits of the next one, float32 [B, K, V].
``ancestors`` int32 [B, K, L]: the beam that had each new token of a beam's text when it was the
newest; None without beam search."""


class Endings(NamedTuple):
    """The tokens ``eos`` int32 [n] that end a row, and ``pad``, an int32 scalar, that follows."""

    eos: jax.Array
    pad: jax.Array

    @classmethod
    def of(cls, eos_id: int | Sequence[int], pad_id: int) -> Endings:
        """A row ends with any of ``eos_id``."""
        return cls(jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)), jnp.int32(pad_id))


class TextLimits(NamedTuple):
    """What bounds a text: its endings, the number of new tokens (an int32 scalar), and texts that
    end it, if any."""

    endings: Endings
    max_new_tokens: jax.Array
    stops: StopStrings | None = None


@dataclass(frozen=True)
class Rules:
    """What all tokens of a call are chosen by, besides the ``Choice``. Ids from ``vocab_size`` on
    are vocabulary padding."""

    limits: TextLimits
    key: jax.Array
    vocab_size: int
    settings: GenerationSettings = NO_SETTINGS

    def processed(self, logits_RV: jax.Array, history: History) -> jax.Array:
        """The logits, changed by the settings."""
        if not self.settings.changes_logits:
            return logits_RV
        return processed(
            logits_RV,
            history,
            self.settings,
            eos=self.limits.endings.eos,
            vocab_size=self.vocab_size,
            max_new_tokens=self.limits.max_new_tokens,
        )

    def ends(
        self, ids: jax.Array, progress: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Whether texts end with the tokens ``ids`` int32 [...], and the updated ``progress``
        through stop strings."""
        ends = jnp.isin(ids, self.limits.endings.eos)
        if self.limits.stops is None or progress is None:
            return ends, None
        progress = self.limits.stops.advance(progress, ids)
        return ends | jnp.any(progress < 0, axis=-1), progress


class Choice(Protocol):
    """How tokens are chosen. A state is a pytree with the ``history`` of rows (of beams)."""

    def start(self, logits_BV: jax.Array, history: History, rules: Rules) -> Any:
        """The state after the first token; ``history`` is that of the prompts."""

    def advance(self, state: Any, logits_BKV: jax.Array, rules: Rules) -> Any:
        """The state after one more token."""

    def unfinished(self, state: Any, rules: Rules) -> jax.Array:
        """Whether the loop goes on, a bool scalar."""

    def ancestors(self, state: Any) -> jax.Array | None:
        """See ``Step``."""

    def result(self, state: Any) -> jax.Array:
        """Prompts and new tokens, int32 [B, L]."""


def advance(
    step: Step, state: Any, cache: Any, choice: Choice, rules: Rules, until: jax.Array
) -> tuple[Any, Any]:
    """State and cache after ``until`` new tokens, or at the end of all texts."""
    batch = choice.result(state).shape[0]

    def unfinished(carry: tuple[Any, Any]) -> jax.Array:
        state, _ = carry
        return (state.history.written < until) & choice.unfinished(state, rules)

    def one_more(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, cache = carry
        ids_BK = state.history.last(1).reshape(batch, -1)
        position_BK = (state.history.length_B - 1).reshape(batch, -1)
        logits_BKV, cache = step(ids_BK, position_BK, choice.ancestors(state), cache)
        return choice.advance(state, logits_BKV, rules), cache

    return jax.lax.while_loop(unfinished, one_more, (state, cache))


def replicate(array: jax.Array) -> jax.Array:
    """The same array, on every device of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())
