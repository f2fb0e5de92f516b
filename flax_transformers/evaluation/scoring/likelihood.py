"""How probable a model finds a text: log-likelihoods of language models, and pseudo-log-likelihoods
of masked ones (Salazar et al., arXiv:1910.14659)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.tokenizers.kinds import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    Frame,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.rows import pad, padded_tokens


@dataclass(frozen=True)
class Likelihood:
    """The ``predict`` of the log-likelihood of each text, of a model that sees what came before.

    Every token is scored, given the tokens before it and those of the frame; without a token before
    it, the first one is not."""

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("input_ids",), causal=True)

    frame: Frame

    def capacity(self, length: int) -> int:
        """Tokens of a text that fit into ``length``."""
        return length - len(self.frame.before)

    def prepare(
        self, example: Arrays, rng: np.random.Generator, vocab: Vocabulary, sequence_length: int
    ) -> Arrays:
        """The frame and ``tokens``: arrays int32 [T]; ``next_weights`` float32 [T], 1 where the
        token after is scored."""
        before = self.frame.before
        ids = np.concatenate([before, example["tokens"]]).astype(np.int32)
        first = max(0, len(before) - 1)
        positions = np.arange(sequence_length)
        scored = (positions >= first) & (positions < len(ids) - 1)
        row = padded_tokens(ids, sequence_length, vocab)
        return row | {
            "labels": pad(ids[1:], sequence_length, 0),
            "next_weights": scored.astype(np.float32),
        }

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``log_likelihood`` and ``tokens`` float32 [B], the sum over the scored ones and their
        number."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        found_BT = log_probabilities(
            model.unembedding(params, hidden_BTD).logits(), batch["labels"]
        )
        weights_BT = batch["next_weights"]
        return {
            "log_likelihood": jnp.sum(found_BT * weights_BT, axis=1),
            "tokens": jnp.sum(weights_BT, axis=1),
        }


@dataclass(frozen=True)
class PseudoLikelihood:
    """The ``predict`` of the log-probability of one token of a text, which is masked."""

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("input_ids",), causal=False)

    frame: Frame

    def capacity(self, length: int) -> int:
        """Tokens of a text that fit into ``length``."""
        return length - len(self.frame.before) - len(self.frame.after)

    def prepare(
        self, example: Arrays, rng: np.random.Generator, vocab: Vocabulary, sequence_length: int
    ) -> Arrays:
        """The frame around ``tokens``, of which that at ``position`` is masked: arrays int32 [T];
        ``masked_position`` and ``labels`` int32 []."""
        before, after = self.frame.before, self.frame.after
        ids = np.concatenate([before, example["tokens"], after]).astype(np.int32)
        position = len(before) + int(example["position"])
        label = ids[position].copy()
        assert vocab.mask_id is not None
        ids[position] = vocab.mask_id
        row = padded_tokens(ids, sequence_length, vocab)
        return row | {"masked_position": np.array(position, np.int32), "labels": np.asarray(label)}

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``log_likelihood`` and ``tokens`` float32 [B], of which the second is 1."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        position_B11 = batch["masked_position"][:, None, None]
        hidden_B1D = jnp.take_along_axis(hidden_BTD, position_B11, axis=1)
        logits_B1V = model.unembedding(params, hidden_B1D).logits()
        found_B1 = log_probabilities(logits_B1V, batch["labels"][:, None])
        return {"log_likelihood": found_B1[:, 0], "tokens": jnp.ones_like(found_B1[:, 0])}


def log_probabilities(logits: Array, labels: Array) -> Array:
    """Log-probabilities float32 [B, M] of labels, of logits [B, M, V]."""
    from flax_transformers.objectives.cross_entropy import cross_entropy

    return -cross_entropy(logits, labels).nll


@dataclass(frozen=True)
class MaskedTokens(Examples):
    """One example for each token of each text: ``tokens`` int32 [n] and ``position`` int32 []."""

    texts: Examples
    text: np.ndarray
    """Text of each example, int64 [n]."""
    position: np.ndarray
    """Token of the text, int64 [n]."""

    @classmethod
    def of_texts(cls, texts: Examples) -> MaskedTokens:
        """The examples for all tokens of ``texts``, whose examples have ``tokens``."""
        rng = np.random.default_rng(0)  # nothing is random
        sizes = [len(texts.read(number, rng)["tokens"]) for number in range(len(texts))]
        positions = [np.arange(size) for size in sizes]
        return cls(texts, np.repeat(np.arange(len(sizes)), sizes), np.concatenate(positions))

    def __len__(self) -> int:
        return len(self.text)

    def read(self, index: int, rng: np.random.Generator) -> Arrays:
        row = self.texts.read(int(self.text[index]), rng)
        return row | {"position": np.array(self.position[index], np.int32)}


def check_lengths(texts: Sequence[np.ndarray], capacity: int) -> None:
    """Raises UserError for a text of more than ``capacity`` tokens."""
    for number, ids in enumerate(texts, 1):
        if len(ids) > capacity:
            raise UserError(
                f"row {number} has {len(ids)} tokens, but the model scores up to {capacity}; "
                "divide the text"
            )


def score_lines(
    rows: int, numbers: np.ndarray, found: Sequence[Arrays], prefix: str = ""
) -> list[dict[str, Any]]:
    """A JSON object for each of the ``rows``: its log-likelihood in nats, the number of its scored
    tokens, and the perplexity. ``prefix`` of these names.

    ``numbers``: the row of each example, int64 [n], for which the model ``found`` a score.
    """
    totals, counts = np.zeros(rows), np.zeros(rows, int)
    for number, one in zip(numbers.tolist(), found, strict=True):
        totals[number] += float(one["log_likelihood"][0])
        counts[number] += int(one["tokens"][0])
    lines = []
    for total, count in zip(totals.tolist(), counts.tolist(), strict=True):
        line: dict[str, Any] = {f"{prefix}log_likelihood": six_digits(total), "tokens": count}
        line[f"{prefix}perplexity"] = (
            six_digits(math.exp(min(700.0, -total / count))) if count else None
        )
        lines.append(line)
    return lines


def bytes_of_first(text: str, tokenizer: Tokenizer) -> float:
    """Number of bytes of a text's first token; the tokens of one character have equal parts."""
    [(_, offsets)] = tokenizer.encode_with_offsets([text])
    size, begins, ends = 0.0, offsets[:, 0], offsets[:, 1]
    for place, character in enumerate(text[: int(ends[0])]):
        sharing = int(((begins <= place) & (place < ends)).sum())
        size += len(character.encode()) / max(1, sharing)
    return size


def six_digits(value: Any) -> float:
    """A number with six digits, the precision of float32."""
    return float(f"{float(value):.6g}")
