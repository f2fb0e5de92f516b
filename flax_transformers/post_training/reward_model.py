"""Reward models: a number for each answer, higher for those that people prefer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.post_training.chat_data import ConversationSpec
from flax_transformers.post_training.supervised import conversation_row, conversation_view


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """What objectives share that compare the completions of a prompt; see `comparison_row`."""

    completions: int = 2
    """Maximum number of completions in a row, those of different prompts together."""
    cross_documents: bool = True
    """Pack the completions of several prompts into a row, as far as they fit."""

    RANGES: ClassVar[ranges.Ranges] = {"completions": ranges.integers(2, 1024)}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def window_spec(self, sequence_length: int) -> ConversationSpec:
        """The windows of conversations for rows of ``sequence_length`` tokens."""
        return ConversationSpec(sequence_length, self.cross_documents, completions=self.completions)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """The completions with their prompts, and which is better than which."""
        pairs = zip(*np.nonzero(row["preferred"]), strict=True)
        note = ", ".join(f"{better + 1} is better than {worse + 1}" for better, worse in pairs)
        return [conversation_view(row, note)]


@dataclass(frozen=True, kw_only=True)
class RewardModel(Comparisons):
    """Score answers so that the better ones score higher: ``-log sigmoid(r_w - r_l - margin)``.

    The model has one label (``model.num_labels`` 1), whose logit at the last token is the reward.
    All pairs of completions of one prompt together count as one, as in InstructGPT
    (arXiv:2203.02155 section 3.5); pairs of equal scores do not count. Margins are those of the
    data (arXiv:2307.09288 section 3.2.2). Dropout is off, whose noise would be part of the
    differences.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("classify",), ("segment_ids",), causal=True)

    centering: float = 0.0
    """Coefficient of the mean of ``(r_w + r_l) ** 2``, which keeps rewards near zero (0.01 in
    arXiv:2312.09244)."""

    RANGES: ClassVar[ranges.Ranges] = {"centering": ranges.COEFFICIENT}

    def predictions(self, sequence_length: int) -> int:
        """One number for each completion."""
        return self.completions

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """The arrays of `comparison_row` without ``labels``; not random."""
        row = comparison_row(example, vocab, sequence_length, self.completions)
        del row["labels"]  # the tokens, which are no classes
        return row

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The losses "reward" and, if enabled, "centering"; the metrics "loss", "accuracy",
        "margin" of pairs and "reward" of completions."""
        import jax  # not at the top: data workers must not import jax
        import jax.numpy as jnp

        reward_BS = rewards(model, params, batch)
        weight_BSS = batch["preferred"]
        margin_BSS = reward_BS[:, :, None] - reward_BS[:, None, :]
        loss_BSS = -jax.nn.log_sigmoid(margin_BSS - batch["margins"])
        count = jnp.sum(weight_BSS)

        def total(values_BSS: Array) -> Array:
            return jnp.sum(values_BSS * weight_BSS)

        losses = {"reward": (total(loss_BSS), count, 1.0)}
        if self.centering:
            sum_BSS = reward_BS[:, :, None] + reward_BS[:, None, :]
            losses["centering"] = total(jnp.square(sum_BSS)), count, self.centering
        used_BS = (batch["ends"] > 0).astype(jnp.float32)
        metrics = {
            "loss": (total(loss_BSS), count),
            "accuracy": (total((margin_BSS > 0).astype(jnp.float32)), count),
            "margin": (total(margin_BSS), count),
            "reward": (jnp.sum(reward_BS * used_BS), jnp.sum(used_BS)),
        }
        return LossTerms(losses, metrics)


def rewards(model: ModelFunctions, params: Params, batch: Batch) -> Array:
    """The logit float32 [B, S] at the last token of each sequence of a row, without dropout; where
    ``ends`` is 0 it means nothing. Raises UserError for a model with more than one label."""
    import jax.numpy as jnp

    hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
    last_BS = jnp.maximum(batch["ends"] - 1, 0)
    hidden_BSD = jnp.take_along_axis(hidden_BTD, last_BS[:, :, None], axis=1)
    ids_BS = jnp.take_along_axis(batch["input_ids"], last_BS, axis=1)
    # Each of these tokens is the last of a sequence: to the head, a sequence of its own.
    hidden_N1D = hidden_BSD.reshape(-1, 1, hidden_BSD.shape[-1])
    ids_N1 = ids_BS.reshape(-1, 1)
    logits_NC = model.head("classify", params, {}, hidden_N1D, ids_N1, jnp.ones_like(ids_N1))
    if logits_NC.shape[1] != 1:
        raise UserError(
            f"a reward is one number, but model.num_labels is {logits_NC.shape[1]}; set "
            "--model.num-labels 1"
        )
    return logits_NC.reshape(last_BS.shape)


def comparison_row(
    example: Arrays, vocab: Vocabulary, sequence_length: int, completions: int
) -> Arrays:
    """The completions of an example as `conversation_row`, and how they compare.

    With S = ``completions``: ``ends`` int32 [S], the number of tokens up to the end of each
    completion, 0 where there is none; ``preferred`` float32 [S, S], positive where the first is
    better than the second completion of a prompt, with the sum 1 for each prompt; ``margins``
    float32 [S, S].
    """
    scores, counts = example["scores"], example["elements"]
    ends = np.zeros(completions, np.int32)
    ends[: len(example["ends"])] = example["ends"]
    preferred = np.zeros((completions, completions), np.float32)
    margins = np.zeros_like(preferred)
    first = 0
    for count, margin in zip(counts.tolist(), example["margins"].tolist(), strict=True):
        here = slice(first, first + count)
        better = scores[here, None] > scores[None, here]
        preferred[here, here] = better / max(1, better.sum())
        margins[here, here] = margin * better
        first += count
    return conversation_row(example, vocab, sequence_length) | {
        "ends": ends,
        "preferred": preferred,
        "margins": margins,
    }
