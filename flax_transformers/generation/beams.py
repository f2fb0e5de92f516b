"""Beam search.

The beams of a row share one cache: a step is a call of the model with K new tokens for each row, of
which each attends to the prompt, once in the cache, and to the tokens of its own text. So nothing
is copied when beams change places; ``ancestors`` says where a beam's tokens are. B rows, K beams,
C candidates, L columns for prompt and new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from flax_transformers import ranges
from flax_transformers.generation.logits import History
from flax_transformers.generation.loop import Rules
from flax_transformers.models.generation_settings import (
    LENGTH_PENALTY,
    EarlyStopping,
    LengthPenaltyForm,
)

EXCLUDED = -1e9
"""Added to the score of what is not to be chosen. It is finite, as in transformers: where settings
forbid nearly all tokens, such candidates are chosen for want of others."""


class Finished(NamedTuple):
    """The best texts that have ended, in order. ``ids_BKL``: prompt and text; ``score_BK``: divided
    by the length penalty; ``real_BK``: False where there is no text yet."""

    ids_BKL: jax.Array
    score_BK: jax.Array
    real_BK: jax.Array


class BeamState(NamedTuple):
    """The state of beam search.

    ``history`` has B * K rows, the texts that go on. ``score_BK`` are their log-probabilities, and
    ``progress_BKN`` their progress through stop strings, if any. ``ancestors_BKL``: see ``Step``.
    ``improvable_B``: whether a text that goes on can become better than those ended.
    ``stuck``: whether no candidate was left that goes on, a bool scalar.
    """

    history: History
    score_BK: jax.Array
    progress_BKN: jax.Array | None
    ancestors_BKL: jax.Array
    finished: Finished
    improvable_B: jax.Array
    stuck: jax.Array


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Beam search with ``num_beams`` beams, as in transformers.

    The score of a text of n tokens, its end included, is its log-probability divided by
    ``n ** length_penalty`` (form "power") or by ``((5 + n) / 6) ** length_penalty`` (form "gnmt",
    arXiv:1609.08144 eq. 14; the Transformer of arXiv:1706.03762 has 4 beams and 0.6). A row ends
    when it has ``num_beams`` ended texts and, by ``early_stopping``: True, at once; False, if the
    best other text, ended at its present length, would not be better; "never", if it could not be
    better at any length.
    """

    num_beams: int
    length_penalty: float = 1.0
    length_penalty_form: LengthPenaltyForm = "power"
    early_stopping: EarlyStopping = False

    RANGES: ClassVar[ranges.Ranges] = {
        "num_beams": ranges.integers(2, 1000),
        "length_penalty": LENGTH_PENALTY,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "")

    def penalty(self, length: jax.Array) -> jax.Array:
        """The divisor of the score of a text of ``length`` tokens, float32."""
        length = length.astype(jnp.float32)
        base = length if self.length_penalty_form == "power" else (5.0 + length) / 6.0
        return base**self.length_penalty

    def start(self, logits_BV: jax.Array, history: History, rules: Rules) -> BeamState:
        beams, (batch, columns) = self.num_beams, history.ids_BL.shape
        # All beams are equal so far, and only the first may go on.
        first_BK = jnp.broadcast_to(jnp.arange(beams)[None, :] == 0, (batch, beams))
        history = history.take(jnp.repeat(jnp.arange(batch), beams))
        stops = rules.limits.stops
        state = BeamState(
            history,
            jnp.where(first_BK, 0.0, EXCLUDED),
            None if stops is None else jnp.repeat(stops.start[:, None], beams, axis=1),
            jnp.zeros((batch, beams, columns), jnp.int32),
            Finished(
                history.ids_BL.reshape(batch, beams, columns),
                jnp.full((batch, beams), EXCLUDED),
                jnp.zeros((batch, beams), bool),
            ),
            jnp.ones((batch,), bool),
            jnp.bool_(False),
        )
        logits_BKV = jnp.broadcast_to(logits_BV[:, None], (batch, beams, logits_BV.shape[-1]))
        return self.advance(state, logits_BKV, rules)

    def advance(self, state: BeamState, logits_BKV: jax.Array, rules: Rules) -> BeamState:
        history, beams = state.history, self.num_beams
        score_BC, parent_BC, id_BC = self._candidates(state, logits_BKV, rules)
        parents = None
        if state.progress_BKN is not None:
            parents = jnp.take_along_axis(state.progress_BKN, parent_BC[:, :, None], axis=1)
        ends_BC, progress_BCN = rules.ends(id_BC, parents)
        length = history.written + 1
        ends_BC |= length >= rules.limits.max_new_tokens

        finished = self._finished(state, score_BC, parent_BC, id_BC, ends_BC)
        running_BC = score_BC + jnp.where(ends_BC, EXCLUDED, 0.0)
        score_BK, chosen_BK = jax.lax.top_k(running_BC, beams)
        parent_BK, id_BK = _take(parent_BC, chosen_BK), _take(id_BC, chosen_BK)
        row_B1 = jnp.arange(len(parent_BK))[:, None] * beams
        ancestors_BKL = _take_rows(state.ancestors_BKL, parent_BK)
        best_B = score_BK[:, 0] / self.penalty(self._best_length(length, rules))
        worst_B = jnp.min(jnp.where(finished.real_BK, finished.score_BK, EXCLUDED), axis=1)
        return BeamState(
            history.take((row_B1 + parent_BK).reshape(-1)).append(id_BK.reshape(-1)),
            score_BK,
            None if progress_BCN is None else _take_rows(progress_BCN, chosen_BK),
            ancestors_BKL.at[:, :, history.end].set(jnp.arange(beams)[None, :]),
            finished,
            state.improvable_B & (best_B > worst_B),
            jnp.all(ends_BC),
        )

    def unfinished(self, state: BeamState, rules: Rules) -> jax.Array:
        all_full = jnp.all(state.finished.real_BK) & (self.early_stopping is True)
        return jnp.any(state.improvable_B) & ~all_full & ~state.stuck

    def ancestors(self, state: BeamState) -> jax.Array:
        return state.ancestors_BKL

    def result(self, state: BeamState) -> jax.Array:
        return state.finished.ids_BKL[:, 0]

    def _candidates(
        self, state: BeamState, logits_BKV: jax.Array, rules: Rules
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The best continuations of all beams, best first: score, beam and token, [B, C].

        There are enough that K go on even if each beam ends in all possible ways.
        """
        batch, beams, size = logits_BKV.shape
        count = max(2, 1 + len(rules.limits.endings.eos)) * beams
        if rules.settings.changes_logits:
            log_RV = jax.nn.log_softmax(logits_BKV.reshape(-1, size), axis=-1)
            log_RV = rules.processed(log_RV, state.history)
            if rules.settings.renormalize_logits:
                log_RV = jax.nn.log_softmax(log_RV, axis=-1)
            logits_BKV = log_RV.reshape(batch, beams, size)
            total_BK = jnp.zeros((batch, beams))
        else:  # normalise the best only
            total_BK = jax.nn.logsumexp(logits_BKV, axis=-1)
        best_BKC, id_BKC = jax.lax.top_k(logits_BKV, min(count, size))
        score_BKC = best_BKC - total_BK[:, :, None] + state.score_BK[:, :, None]
        score_BC, place_BC = jax.lax.top_k(score_BKC.reshape(batch, -1), count)
        return (
            score_BC,
            place_BC // best_BKC.shape[-1],
            _take(id_BKC.reshape(batch, -1), place_BC).astype(jnp.int32),
        )

    def _finished(
        self,
        state: BeamState,
        score_BC: jax.Array,
        parent_BC: jax.Array,
        id_BC: jax.Array,
        ends_BC: jax.Array,
    ) -> Finished:
        """The best of the ended texts and of the candidates that end now."""
        beams, old = self.num_beams, state.finished
        # A candidate that ends counts only if it is among the best K.
        counts_BC = ends_BC & (jnp.arange(ends_BC.shape[1])[None, :] < beams)
        full_B1 = jnp.all(old.real_BK, axis=1, keepdims=True) & (self.early_stopping is True)
        closed_B1 = full_B1 | ~state.improvable_B[:, None]
        new_BC = score_BC / self.penalty(state.history.written + 1)
        new_BC = new_BC + jnp.where(counts_BC, 0.0, EXCLUDED) + jnp.where(closed_B1, EXCLUDED, 0.0)
        merged_BX = jnp.concatenate([old.score_BK, new_BC], axis=1)
        score_BK, chosen_BK = jax.lax.top_k(merged_BX, beams)
        real_BX = jnp.concatenate([old.real_BK, counts_BC], axis=1)
        source_BX = jnp.concatenate(
            [jnp.broadcast_to(jnp.arange(beams)[None, :], old.real_BK.shape), beams + parent_BC], 1
        )
        running_BKL = state.history.ids_BL.reshape(old.ids_BKL.shape)
        texts_BXL = jnp.concatenate([old.ids_BKL, running_BKL], axis=1)
        ids_BKL = _take_rows(texts_BXL, _take(source_BX, chosen_BK))
        newest_BX = jnp.pad(id_BC, ((0, 0), (beams, 0)))
        column = state.history.end
        last_BK = jnp.where(chosen_BK < beams, ids_BKL[:, :, column], _take(newest_BX, chosen_BK))
        return Finished(ids_BKL.at[:, :, column].set(last_BK), score_BK, _take(real_BX, chosen_BK))

    def _best_length(self, length: jax.Array, rules: Rules) -> jax.Array:
        """The length at which the score of a text that goes on is compared with those ended."""
        if self.early_stopping == "never" and self.length_penalty > 0.0:
            return rules.limits.max_new_tokens
        return length


def _take(array_BX: jax.Array, index_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array_BX, index_BK, axis=1)


def _take_rows(array_BXL: jax.Array, index_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array_BXL, index_BK[:, :, None], axis=1)
