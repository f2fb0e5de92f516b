"""Votes of a reward model between the answers of two models, and the rating that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flax_transformers.data.tokenizers.kinds import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.generation.prompts import rows_of
from flax_transformers.post_training.chat_data import encode
from flax_transformers.post_training.chat_template import ChatTemplate, Message, TemplateError
from flax_transformers.post_training.conversations import Conversation

_SAMPLES = 1000  # of the bootstrap
_INTERVAL = (2.5, 97.5)
_ELO = 400 / math.log(10)  # points for a factor of e in the odds


def check_judge(model: Any) -> None:
    """Raises UserError for a model that is no sequence classifier of one label."""
    if not hasattr(model, "classify") or model.config.num_labels != 1:
        raise UserError(
            "the judge is no reward model: it needs a head for sequence classification with one "
            "label, such as RewardModel trains"
        )


def judged_ids(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Any = None,
) -> list[int]:
    """The ids of an answered conversation; without a template, of a question and its answer as one
    plain text, as `RewardModel` is trained on it. Raises UserError if the template refuses it."""
    if template is None:
        question, answer = (one["content"] for one in messages)
        document = Conversation((), prompt=question, completions=(answer,))
        (found,), _ = encode(document, ChatTemplate(), tokenizer)
        return list(map(int, found))
    try:
        text = template.render(messages, tools)
    except TemplateError as error:
        raise UserError(f"the judge cannot read an answer: {error}") from error
    return list(map(int, tokenizer.encode_prompt(text)))


def judged_rewards(
    model: Any,
    params: Any,
    encoded: Sequence[Sequence[int]],
    batch_size: int = 16,
) -> np.ndarray:
    """The reward of each answer, float32 [n], by a sequence classifier of one label.

    ``encoded``: the `judged_ids` of each. Raises UserError for another model, and for one that is
    too long for it.
    """
    check_judge(model)
    limit = model.config.length_limit
    longest = max(map(len, encoded))
    if limit is not None and longest > limit:
        raise UserError(
            f"an answer with its prompt has {longest} tokens, but the judge takes {limit}; set "
            "--max-new-tokens lower"
        )

    @jax.jit
    def logits(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        found: jax.Array = model.apply({"params": params}, ids, mask).logits[:, 0]
        return found

    found = []
    for first in range(0, len(encoded), batch_size):
        some = list(encoded[first : first + batch_size])
        filled = some + [some[-1]] * (batch_size - len(some))
        ids, mask = rows_of(filled, model.config.filler_id, padded="right")
        ids, mask = ids[:, :limit], mask[:, :limit]  # of a power of two, which can be longer
        found.append(np.asarray(logits(params, ids, mask))[: len(some)])
    return np.concatenate(found)


def votes_by(scores: Sequence[np.ndarray]) -> list[float]:
    """1 where the first of two scores is higher, 0 where the second is, 0.5 for equal ones."""
    first, second = scores
    return [0.5 + 0.5 * float(np.sign(a - b)) for a, b in zip(first, second, strict=True)]


def elo_difference(votes: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """The rating of the first model above the second, in Elo points, between the ends of its 95 %
    interval by bootstrap: (low, rating, high).

    ``votes`` float [n]: 1 for the first, 0 for the second, 0.5 for a tie. Half a vote for each is
    added, so that a model that wins always has a finite rating.
    """

    def rating(wins: np.ndarray) -> np.ndarray:
        return _ELO * np.log((wins + 0.5) / (len(votes) - wins + 0.5))

    drawn = rng.choice(votes, (_SAMPLES, len(votes))).sum(1)
    low, high = np.percentile(rating(drawn), _INTERVAL)
    return float(low), float(rating(votes.sum())), float(high)
