"""How probable a language model finds continuations of a context, and which choice it prefers.

Contexts and continuations are tokenized together, and choices are compared, as in EleutherAI's
lm-evaluation-harness: by the log-likelihood (its "acc"), and by the log-likelihood over the number
of characters ("acc_norm").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flax_transformers.data.inputs import InputRow
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.scoring.likelihood import log_probabilities, six_digits
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.rows import pad, padded_tokens


class Continuation(NamedTuple):
    """Ids of a context with the tokens before it, and of its continuation."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Requests(Examples):
    """Requests as examples: ``tokens`` int32 [n], of which the last ``scored`` int32 [] count."""

    requests: Sequence[Continuation]

    def __len__(self) -> int:
        return len(self.requests)

    def read(self, index: int, rng: np.random.Generator) -> Arrays:
        context, continuation = self.requests[index]
        return {
            "tokens": np.array([*context, *continuation], np.int32),
            "scored": np.array(len(continuation), np.int32),
        }


@dataclass(frozen=True)
class ContinuationLikelihood:
    """The ``predict`` of the log-likelihood of each continuation."""

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("input_ids",), causal=True)

    bidirectional_context: bool = False
    """The tokens of a context attend to each other both ways, as prompts do in `generate`."""

    def prepare(
        self, example: Arrays, rng: np.random.Generator, vocab: Vocabulary, sequence_length: int
    ) -> Arrays:
        """``tokens`` but the last one, and ``labels``, the token after each: arrays int32 [T];
        ``next_weights`` float32 [T], 1 where that token is scored; with a bidirectional context,
        its ``prefix_mask`` int32 [T]. Of a context that is too long, the end is kept."""
        ids = example["tokens"][-(sequence_length + 1) :]
        row = padded_tokens(ids[:-1], sequence_length, vocab)
        places, context = np.arange(sequence_length), len(ids) - int(example["scored"])
        scored = (places < len(ids) - 1) & (places >= context - 1)
        labels = pad(ids[1:], sequence_length, 0)
        if self.bidirectional_context:
            row |= {"prefix_mask": (places < context).astype(np.int32)}
        return row | {"labels": labels, "next_weights": scored.astype(np.float32)}

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``log_likelihood`` float32 [B], and ``greedy`` bool [B], whether greedy decoding would
        give the continuation."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
        logits_BTV = model.unembedding(params, hidden_BTD).logits()
        weight_BT, label_BT = batch["next_weights"], batch["labels"]
        found_BT = log_probabilities(logits_BTV, label_BT)
        likeliest_BT = jnp.argmax(logits_BTV, axis=2) == label_BT
        return {
            "log_likelihood": jnp.sum(found_BT * weight_BT, axis=1),
            "greedy": jnp.all(likeliest_BT | (weight_BT == 0), axis=1),
        }


def request_of(
    tokenizer: Tokenizer, context: str, continuation: str, before: Sequence[int]
) -> Continuation:
    """The ids of a context and of what follows; ``before``: tokens before the context.

    Spaces at the end of the context count as the begin of the continuation, whose ids are what the
    text as a whole has after those of the context.
    """
    kept = context.rstrip()
    together = tokenizer.encode_batch([kept, context + continuation])
    first, whole = (ids.tolist() for ids in together)
    return Continuation([*before, *first], whole[len(first) :])


def check_requests(requests: Sequence[Continuation], length: int, what: str) -> None:
    """Raises UserError for a continuation without tokens, without a token before it, or longer than
    ``length``. ``what`` names the requests."""
    for number, (context, continuation) in enumerate(requests, 1):
        if not continuation:
            raise UserError(f"{what} {number} has no tokens to score; leave it out")
        if not context:
            raise UserError(
                f"{what} {number} has no token before it; give it a context, or use a tokenizer "
                "that begins texts with a special token"
            )
        if len(continuation) > length:
            raise UserError(
                f"{what} {number} has {len(continuation)} tokens, but the model scores up to "
                f"{length}; shorten it"
            )


def choice_requests(
    rows: Sequence[InputRow], tokenizer: Tokenizer, before: Sequence[int]
) -> list[Continuation]:
    """A request for each choice of each row, after its context and a space."""
    return [
        request_of(tokenizer, row.context, f" {choice}", before)
        for row in rows
        for choice in row.choices
    ]


def choice_lines(rows: Sequence[InputRow], found: Sequence[Arrays]) -> list[dict[str, Any]]:
    """A JSON object for each row: the log-likelihood of each choice in nats, the best choice by it
    and by it per character, and, if the answer is known, whether they are right.

    ``found``: what `ContinuationLikelihood` gives for each request."""
    lines, start = [], 0
    for row in rows:
        some = found[start : start + len(row.choices)]
        start += len(row.choices)
        totals = np.array([float(one["log_likelihood"][0]) for one in some])
        lengths = np.array([len(choice) for choice in row.choices])
        best, normalised = int(totals.argmax()), int((totals / lengths).argmax())
        line: dict[str, Any] = {
            "log_likelihoods": list(map(six_digits, totals)),
            "choice": best,
            "choice_normalised": normalised,
        }
        if row.answer is not None:
            line |= {"right": best == row.answer, "right_normalised": normalised == row.answer}
        lines.append(line)
    return lines


def accuracies(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """``{"accuracy", "accuracy_normalised"}`` of `choice_lines`; empty without answers."""
    names = {"accuracy": "right", "accuracy_normalised": "right_normalised"}
    if not all("right" in line for line in lines):
        return {}
    return {name: float(np.mean([line[key] for line in lines])) for name, key in names.items()}
