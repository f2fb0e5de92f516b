"""Objectives of reinforcement learning on completions that the trained model samples itself.

Shapes: R rows of a rollout, B rows of a batch, T tokens of prompt and completion, C tokens of the
longest completion, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.generation.sampling import Sampling
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
from flax_transformers.objectives.lm_loss import MAX_LOGITS
from flax_transformers.objectives.rows import document_start, end_id, pad, padded_tokens
from flax_transformers.objectives.sequence_to_sequence import PairSpec
from flax_transformers.post_training.reinforcement.rewards import Reward, reward_names

STD_EPSILON = 1e-4
"""Added to the standard deviation of rewards, as in TRL."""
STATISTICS = "rollout/"
"""Prefix of the arrays [B] of a batch that are logged as means over rows, and not trained on."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """How completions are sampled from the model, and what scores them.

    A rollout gives ``batches`` training batches, each of which is trained on ``epochs`` times. So
    the model that samples is at most ``batches * epochs - 1`` steps older than the one that is
    trained; with 1 and 1, training is on-policy.
    """

    rewards: tuple[Reward, ...]
    """What scores completions; the reward is their sum with their weights."""
    completion_length: int = 64
    """Maximum number of tokens of a completion, its end token included. A prompt has the rest of
    the sequence length; longer prompts are left out."""
    group_size: int = 8
    """Completions of each prompt."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities that are trained."""
    top_k: int | None = None
    top_p: float | None = None
    batches: int = 1
    """Training batches of a rollout."""
    epochs: int = 1
    """How often each of them is trained on."""
    mask_truncated: bool = False
    """Do not train on completions that did not end within ``completion_length``."""
    gather_weights: bool = False
    """Sample with weights that are not divided over the mesh axis ``fsdp``. Otherwise every token
    gathers them again, which is slower but takes no further memory."""
    kept: int = 100
    """Number of the newest rollouts whose arrays are kept in the workdir. A run that resumes in the
    middle of a rollout needs it; if it is missing, new completions are sampled."""

    RANGES: ClassVar[ranges.Ranges] = {
        "completion_length": ranges.POSITIONS,
        "group_size": ranges.EXAMPLES,
        "temperature": ranges.numbers(0, 1e6, above=True),
        "top_k": ranges.ENTRIES,
        "top_p": ranges.numbers(0, 1, above=True),
        "batches": ranges.integers(1, 10_000),
        "epochs": ranges.integers(1, 10_000),
        "kept": ranges.integers(),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective.rollouts")
        if not self.rewards:
            raise ranges.OutOfRange(
                "objective.rollouts.rewards is empty; give at least one, such as ExactAnswer()"
            )

    @property
    def steps(self) -> int:
        """Training steps of a rollout."""
        return self.batches * self.epochs

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """Base of objectives whose examples are completions of the model that is trained.

    The data are prompts: pairs of a prompt and an answer that rewards compare with. ``prepare``
    makes a row of such a pair, as if the model had written the answer, which only ``inspect`` and
    checks of shapes use; the rows of training come from ``rollouts.rollout_batches``. Dropout is
    off, because probabilities of one model are compared with those of another.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("attention_mask",), causal=True)

    rollouts: Rollouts
    clip_low: float = 0.2
    """Ratios of probabilities below ``1 - clip_low`` have no gradient (arXiv:1707.06347)."""
    clip_high: float = 0.2
    """Ratios above ``1 + clip_high`` have none; 0.28 in DAPO (arXiv:2503.14476 section 3.1)."""
    max_logits: int = MAX_LOGITS
    """As in ``LMLoss``."""

    RANGES: ClassVar[ranges.Ranges] = {
        "clip_low": ranges.SHARE,
        "clip_high": ranges.numbers(0, 1e6),
        "max_logits": ranges.integers(1, 2**48),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")
        names = self.statistics
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ranges.OutOfRange(
                f"objective.rollouts.rewards has a reward whose metric would be {twice}, which is "
                "another one; give its function, or class, another name"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether rows have the log-probabilities of the model that training started from."""
        raise NotImplementedError

    @property
    def needs_old(self) -> bool:
        """Whether rows have what ``measured`` gives of the model that sampled them."""
        return self.rollouts.steps > 1

    @property
    def statistics(self) -> list[str]:
        """Names of the arrays [B] that are only logged."""
        names = ["reward", "reward_std", "no_signal", "completion_length", "truncated"]
        names += ["off_policy_steps", *reward_names(self.rollouts.rewards)]
        return [STATISTICS + name for name in names]

    def window_spec(self, sequence_length: int) -> PairSpec:
        """One prompt for each example, with its answer; long prompts are left out."""
        prompt = self.prompt_length(sequence_length)
        # Answers of any length: rewards read them, and no model does.
        return PairSpec(
            prompt, cross_documents=False, target_length=None, overhead=1, long_pairs="skip"
        )

    def prompt_length(self, sequence_length: int) -> int:
        """Maximum number of tokens of a prompt. Raises UserError if completions leave it none."""
        rest = sequence_length - self.rollouts.completion_length
        if rest < 2:
            raise UserError(
                f"phases.sequence_length is {sequence_length}, of which completions of "
                f"objective.rollouts.completion_length {self.rollouts.completion_length} leave "
                f"{max(rest, 0)} tokens for a prompt; set one of the two"
            )
        return rest

    def predictions(self, sequence_length: int) -> int:
        """Logits are computed for the tokens of completions."""
        return self.rollouts.completion_length

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """A row in which the answer is the completion, without an advantage; see
        `completion_row` for its arrays, to which those of rollouts are added."""
        if "source_tokens" not in example:
            raise UserError(
                f"objective {type(self).__name__} needs prompts with answers; set data.source to a "
                "PairSource"
            )
        prompt = np.append(document_start(vocab), example["source_tokens"])
        answer = np.append(example["target_tokens"], end_id(vocab))
        length = self.rollouts.completion_length
        row = completion_row(prompt, answer[:length], vocab, sequence_length, length)
        sampled = self.sampled_arrays(row, 1)
        return row | {name: array[0] for name, array in sampled.items()}

    def sampled_arrays(self, row: Arrays, rows: int) -> Arrays:
        """Zeros for what rollouts add to rows such as ``row``: arrays [``rows``, ...]."""
        per_token = np.zeros((rows, *row["labels"].shape), np.float32)
        arrays = dict.fromkeys(self.statistics, np.zeros(rows, np.float32))
        arrays["advantages"] = np.zeros(rows, np.float32)
        if self.needs_old:
            arrays["old_log_probs"] = per_token
        if self.needs_reference:
            arrays["reference_log_probs"] = per_token
        return arrays

    def measured(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """What rollouts keep of a model: ``log_probs`` float32 [B, C]."""
        return {"log_probs": self.log_probs(model, params, batch)[0]}

    def log_probs(self, model: ModelFunctions, params: Params, batch: Batch) -> tuple[Array, Array]:
        """Log-probabilities float32 [B, C] of the labels, and the sum of the entropies of the
        tokens that are trained on, each at the temperature of sampling."""
        return self.scored(model, params, label_states(model, params, batch), batch)

    def scored(
        self, model: ModelFunctions, params: Params, hidden_BCD: Array, batch: Batch
    ) -> tuple[Array, Array]:
        """The same from the hidden states of `label_states`."""
        from flax_transformers.objectives.cross_entropy import lm_scores

        unembedding = model.unembedding(params, hidden_BCD)
        if self.rollouts.temperature != 1.0:
            unembedding = scaled(unembedding, 1.0 / self.rollouts.temperature)
        scores = lm_scores(unembedding, batch["labels"], self.max_logits)
        entropy = entropy_sum(unembedding, batch, self.max_logits)
        return -scores.nll, entropy

    def clipped(
        self, ratio_BC: Array, advantages_BC: Array, weights_BC: Array
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """The clipped loss of each token, float32 [B, C], and the shares of tokens without a
        gradient, as metrics; ``advantages_BC`` may be [B, 1]."""
        import jax.numpy as jnp

        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        clipped_BC = jnp.clip(ratio_BC, low, high)
        loss_BC = -jnp.minimum(ratio_BC * advantages_BC, clipped_BC * advantages_BC)
        tokens = jnp.sum(weights_BC)
        outside = {
            "low": (ratio_BC < low) & (advantages_BC < 0),
            "high": (ratio_BC > high) & (advantages_BC > 0),
        }
        metrics = {
            f"policy/clipped_{side}": (jnp.sum(where * weights_BC), tokens)
            for side, where in outside.items()
        }
        return loss_BC, metrics

    def advantages(self, rewards_R: np.ndarray, rows: Arrays) -> Arrays:
        """``advantages`` of a rollout, and whatever else its ``rows`` [R, ...] are trained with."""
        raise NotImplementedError

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """Sums and weights of one (micro-)batch of rollouts."""
        raise NotImplementedError

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """Prompt and completion, with the tokens that are trained on."""
        used = int(row["attention_mask"].sum())
        trained = row["label_weights"] > 0
        labels = np.full(used, -1, np.int32)
        labels[row["label_positions"][trained] + 1] = row["labels"][trained]
        note = f"advantage {float(np.mean(row['advantages'])):.4g}"
        return [ExampleView("row", row["input_ids"][:used], labels, note=note)]


def completion_row(
    prompt: np.ndarray,
    completion: np.ndarray,
    vocab: Vocabulary,
    sequence_length: int,
    completion_length: int,
) -> Arrays:
    """The tokens of a prompt and its completion, int32 [n] each, as a row of fixed shapes.

    ``input_ids`` and ``attention_mask`` int32 [T]; ``labels`` int32 [C], the completion, and
    ``label_positions`` int32 [C], the positions that predict it; ``label_weights`` float32 [C], 0
    beyond the completion.
    """
    count = len(completion)
    row = padded_tokens(np.concatenate([prompt, completion]), sequence_length, vocab)
    return row | {
        "labels": pad(completion, completion_length, vocab.pad_id),
        "label_positions": pad(np.arange(count) + len(prompt) - 1, completion_length, 0),
        "label_weights": pad(np.ones(count, np.float32), completion_length, 0),
    }


def label_states(model: ModelFunctions, params: Params, batch: Batch) -> Array:
    """Hidden states [B, C, D] at the positions that predict the labels, without dropout."""
    import jax.numpy as jnp  # not at the top: configs are read without jax

    hidden_BTD = model.hidden_states(params, batch, {}).last_hidden_state
    positions_BC = batch["label_positions"]
    return jnp.take_along_axis(hidden_BTD, positions_BC[:, :, None], axis=1)


def ratios(log_probs_BC: Array, batch: Batch) -> Array:
    """Probabilities of the labels over those when they were sampled, float32 [B, C]; 1 without a
    weight. Without ``old_log_probs`` in the batch, training is on-policy."""
    import jax
    import jax.numpy as jnp

    old_BC = batch.get("old_log_probs", jax.lax.stop_gradient(log_probs_BC))
    # Padding has no meaningful probability, and could overflow.
    return jnp.exp(jnp.where(batch["label_weights"] > 0, log_probs_BC - old_BC, 0.0))


def scaled(unembedding: Any, factor: Any) -> Any:
    """An ``Unembedding`` whose logits are multiplied by ``factor``, a Python number where they are
    bounded: f c tanh(l / c) is (f c) tanh(f l / (f c))."""
    hidden, bias, cap = unembedding.hidden_BMD, unembedding.bias_V, unembedding.softcap
    return unembedding.replace(
        hidden_BMD=(hidden * factor).astype(hidden.dtype),
        bias_V=None if bias is None else bias * factor,
        softcap=None if cap is None else cap * factor,
    )


def entropy_sum(unembedding: Any, batch: Batch, max_logits: int) -> Array:
    """Sum over tokens of weight times entropy in nats, a float32 scalar without a gradient.

    The entropy is log Z minus the mean logit under the model, and this mean is the derivative of
    log Z by a factor of all logits: so it needs no more logits at once than the loss. Bounded
    logits have no such factor: theirs are computed for one row at a time.
    """
    import jax
    import jax.numpy as jnp

    from flax_transformers.objectives.cross_entropy import lm_scores

    unembedding = jax.lax.stop_gradient(unembedding)
    if unembedding.softcap is not None:

        def of_row(hidden_CD: jax.Array) -> jax.Array:
            logits_CV = unembedding.replace(hidden_BMD=hidden_CD[None]).logits()[0]
            mean_C = jnp.sum(jax.nn.softmax(logits_CV) * logits_CV, axis=-1)
            return jax.nn.logsumexp(logits_CV, axis=-1) - mean_C

        entropy_BC = jax.lax.map(of_row, unembedding.hidden_BMD)
        return jnp.sum(entropy_BC * batch["label_weights"])

    def log_z(factor: jax.Array) -> jax.Array:
        scores = lm_scores(scaled(unembedding, factor), batch["labels"], max_logits)
        return jnp.sum(scores.log_z * batch["label_weights"])

    total, mean_logits = jax.value_and_grad(log_z)(jnp.float32(1))
    return total - mean_logits


def kl_estimate(log_probs: Array, reference: Array, weights: Array) -> Array:
    """The estimate "k3" of the divergence from a reference, ``exp(d) - d - 1`` with ``d`` the
    difference of log-probabilities (http://joschu.net/blog/kl-approx.html); 0 without a weight."""
    import jax.numpy as jnp

    difference = jnp.where(weights > 0, reference - log_probs, 0.0)
    return jnp.exp(difference) - difference - 1.0


def statistics_of(batch: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Means over the rows of what a rollout noted of each, as metrics."""
    import jax.numpy as jnp

    rows = jnp.sum(batch["attention_mask"][:, 0] > 0).astype(jnp.float32)
    return {
        name: (jnp.sum(array), rows) for name, array in batch.items() if name.startswith(STATISTICS)
    }


@dataclass(frozen=True, kw_only=True)
class GroupRelativePolicy(PolicyObjective):
    """Group relative policy optimisation, GRPO (arXiv:2402.03300), and its variants by name.

    The advantage of a completion is its reward minus the mean reward of the completions of its
    prompt. At the first step of a rollout the loss with the normaliser "grpo" is 0 if
    ``kl_coefficient`` is, and its gradient is not.
    """

    normalizer: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    """What the sum over tokens is divided by: "grpo", the length of the completion, and then the
    number of completions; "bnpo" and "dapo" (arXiv:2503.14476), the tokens of all completions of
    the global batch (TRL's bnpo takes those of a micro-batch, which ours has no notion of);
    "dr_grpo" (arXiv:2503.20783), the number of completions times ``completion_length``."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the rewards of the group, or of the
    whole rollout; "none" as in Dr. GRPO."""
    kl_coefficient: float = 0.0
    """Coefficient of the divergence from the model that training started from; 0: no reference."""
    unbiased_kl: bool = True
    """Multiply the estimate of the divergence by the ratio of probabilities, so that its gradient
    is that of the divergence (arXiv:2512.02556); False: as in the GRPO paper."""

    RANGES: ClassVar[ranges.Ranges] = {"kl_coefficient": ranges.COEFFICIENT}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollouts.group_size < 2:
            raise ranges.OutOfRange(
                "objective.rollouts.group_size is 1; advantages compare the completions of one "
                "prompt: set it to 2 or more"
            )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient > 0

    def advantages(self, rewards_R: np.ndarray, rows: Arrays) -> Arrays:
        """``advantages`` float32 [R] of the rewards float32 [R]; the completions of a prompt follow
        each other."""
        groups = rewards_R.astype(np.float64).reshape(-1, self.rollouts.group_size)
        centred = groups - groups.mean(axis=1, keepdims=True)
        if self.scale_rewards == "group":
            centred /= groups.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON
        elif self.scale_rewards == "batch":
            centred /= groups.std(ddof=1) + STD_EPSILON
        return {"advantages": centred.reshape(-1).astype(np.float32)}

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The losses "policy" and, with a coefficient, "kl"; metrics of both, of the entropy, and
        of the rollout."""
        import jax.numpy as jnp

        weights_BC = batch["label_weights"]
        tokens = jnp.sum(weights_BC)
        log_probs_BC, entropy = self.log_probs(model, params, batch)
        ratio_BC = ratios(log_probs_BC, batch)
        loss_BC, metrics = self.clipped(ratio_BC, batch["advantages"][:, None], weights_BC)
        share_BC, weight = self._normalized(batch)
        policy = jnp.sum(loss_BC * share_BC)
        metrics |= statistics_of(batch) | {
            "loss": (policy, weight),
            "policy/entropy": (entropy, tokens),
        }
        losses = {"policy": (policy, weight, 1.0)}
        if self.needs_reference:
            kl_BC = kl_estimate(log_probs_BC, batch["reference_log_probs"], weights_BC)
            if self.unbiased_kl:
                kl_BC *= ratio_BC
            kl = jnp.sum(kl_BC * share_BC)
            losses["kl"] = (kl, weight, self.kl_coefficient)
            metrics["loss"] = (policy + self.kl_coefficient * kl, weight)
            metrics["policy/kl"] = (jnp.sum(kl_BC * weights_BC), tokens)
        return LossTerms(losses, metrics)

    def _normalized(self, batch: Batch) -> tuple[Array, Array]:
        """The share of each token in the sum, float32 [B, C], and the weight of the sum."""
        import jax.numpy as jnp

        weights_BC = batch["label_weights"]
        rows = jnp.sum(batch["attention_mask"][:, 0] > 0).astype(jnp.float32)
        if self.normalizer == "grpo":
            lengths_B1 = jnp.maximum(jnp.sum(weights_BC, axis=1, keepdims=True), 1.0)
            return weights_BC / lengths_B1, rows
        if self.normalizer == "dr_grpo":
            return weights_BC, rows * self.rollouts.completion_length
        return weights_BC, jnp.sum(weights_BC)
