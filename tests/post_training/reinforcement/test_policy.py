"""Objectives on sampled completions: GRPO."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.models.heads import Unembedding
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.post_training.reinforcement.policy import (
    GroupRelativePolicy,
    Rollouts,
    completion_row,
    entropy_sum,
    kl_estimate,
    scaled,
)
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer, MatchesPattern
from flax_transformers.testing import tiny_model
from flax_transformers.training.step import model_functions, total_loss

COMPLETION, LENGTH = 5, 12
VOCABULARY = Vocabulary(size=96, pad_id=0, eos_id=2, special_ids=(0, 2))
NORMALIZERS = ["grpo", "bnpo", "dapo", "dr_grpo"]


def objective(normalizer="grpo", group_size=2, **changes):
    own = {f.name for f in dataclasses.fields(Rollouts)} & changes.keys()
    rollouts = {
        "rewards": (ExactAnswer(),),
        "completion_length": COMPLETION,
        "group_size": group_size,
    } | {name: changes.pop(name) for name in own}
    return GroupRelativePolicy(rollouts=Rollouts(**rollouts), normalizer=normalizer, **changes)


@pytest.fixture(scope="module")
def rows():
    """Four rows of two groups, with completions of several lengths."""
    random = np.random.default_rng(0)
    lengths = ((4, 5), (4, 2), (6, 3), (6, 1))
    made = stacked(
        [
            completion_row(
                random.integers(3, 96, p), random.integers(3, 96, c), VOCABULARY, LENGTH, COMPLETION
            )
            for p, c in lengths
        ]
    )
    advantages = objective().advantages(np.array([1.0, 0.0, 0.25, 0.75]), made)
    return made | advantages


@pytest.fixture(scope="module")
def model():
    network, params = tiny_model("LlamaForCausalLM", init_std=0.3)
    return model_functions(network), params


def test_a_row_has_its_completion_after_the_positions_that_predict_it():
    row = completion_row(np.array([7, 8, 9]), np.array([4, 2]), VOCABULARY, 8, 4)
    assert row["input_ids"].tolist() == [7, 8, 9, 4, 2, 0, 0, 0]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert row["labels"].tolist() == [4, 2, 0, 0]
    assert row["label_positions"].tolist() == [2, 3, 0, 0]
    assert row["label_weights"].tolist() == [1, 1, 0, 0]


def test_advantages_compare_the_completions_of_one_prompt():
    rewards = np.array([1.0, 0.0, 0.0, 5.0, 5.0, 5.0])
    found = objective(group_size=3).advantages(rewards, {})["advantages"]
    std = np.std([1, 0, 0], ddof=1) + 1e-4
    np.testing.assert_allclose(found, [2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0, 0, 0], rtol=1e-6)
    none = objective(group_size=3, scale_rewards="none").advantages(rewards, {})["advantages"]
    np.testing.assert_allclose(none, [2 / 3, -1 / 3, -1 / 3, 0, 0, 0], rtol=1e-6)
    batch = objective(group_size=3, scale_rewards="batch").advantages(rewards, {})["advantages"]
    std = np.std(rewards, ddof=1) + 1e-4  # of all rewards, not of the centred ones
    np.testing.assert_allclose(batch, none / std, rtol=1e-6)


@pytest.mark.slow
def test_at_the_first_step_the_loss_is_zero_and_the_gradient_is_not(model, rows):
    functions, params = model

    def loss(params):
        return total_loss(objective().terms(functions, params, rows, {}))

    found, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(found)) < 1e-6
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients)) > 1e-2


@pytest.fixture(scope="module")
def log_probs(model, rows):
    """Of the completions, under the model."""
    functions, params = model
    return np.asarray(jax.jit(lambda p: objective().log_probs(functions, p, rows)[0])(params))


@pytest.fixture(scope="module")
def off_policy(rows, log_probs):
    noise = np.random.default_rng(1).normal(0, 0.4, (2, *log_probs.shape)).astype(np.float32)
    return rows | {
        "old_log_probs": log_probs + noise[0],
        "reference_log_probs": log_probs + noise[1],
    }


def terms_of(model, **settings):
    """A compiled function from a batch to the total loss, losses and metrics by normalizer."""
    functions, params = model

    def terms(batch):
        found = {
            name: objective(name, **settings).terms(functions, params, batch, {})
            for name in NORMALIZERS
        }
        return {name: (total_loss(one), one.losses, one.metrics) for name, one in found.items()}

    return jax.jit(terms)


@pytest.mark.slow
def test_the_loss_is_that_of_the_formula(model, off_policy, log_probs):
    settings = {"batches": 2, "clip_low": 0.1, "clip_high": 0.3, "kl_coefficient": 0.05}
    found = terms_of(model, unbiased_kl=False, **settings)(off_policy)
    batch, log_probs = off_policy, log_probs.astype(np.float64)
    ratio = np.exp(log_probs - batch["old_log_probs"])
    advantage = batch["advantages"][:, None]
    d = batch["reference_log_probs"] - log_probs
    each = -np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.3) * advantage)
    each += 0.05 * (np.exp(d) - d - 1)
    mask = batch["label_weights"]
    sums = (each * mask).sum(axis=1)
    expected = {
        "grpo": (sums / mask.sum(axis=1)).mean(),
        "bnpo": sums.sum() / mask.sum(),
        "dapo": sums.sum() / mask.sum(),
        "dr_grpo": sums.sum() / (len(mask) * COMPLETION),
    }
    for name, (total, _, metrics) in found.items():
        np.testing.assert_allclose(total, expected[name], rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(np.divide(*metrics["loss"]), expected[name], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [4, pytest.param(2, marks=pytest.mark.full)])
def test_parts_of_a_batch_add_up_to_the_whole(parts, model, off_policy):
    """Weights depend on the data alone, so the loss is the same for any number of micro-batches."""
    terms = terms_of(model, batches=2, kl_coefficient=0.05)
    whole = terms(off_policy)
    split = [terms({n: a[k::parts] for n, a in off_policy.items()}) for k in range(parts)]
    for normalizer, (_, losses, metrics) in whole.items():
        for name, (value, weight, _) in losses.items():
            found = np.sum([part[normalizer][1][name][:2] for part in split], axis=0)
            np.testing.assert_allclose(found, [value, weight], rtol=1e-5, atol=1e-6)
        for name, pair in metrics.items():
            found = np.sum([part[normalizer][2][name] for part in split], axis=0)
            np.testing.assert_allclose(found, pair, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_completion_without_weights_has_no_loss_and_still_counts_as_a_row(model, off_policy):
    functions, params = model
    weights = off_policy["label_weights"] * np.array([[1], [0], [1], [1]], np.float32)
    masked = off_policy | {"label_weights": weights}
    other = masked | {"old_log_probs": masked["old_log_probs"].copy()}
    other["old_log_probs"][1] = -1e6  # would overflow
    made = objective(batches=2)
    loss = jax.jit(lambda given: made.terms(functions, params, given, {}).losses["policy"])
    (value, weight, _), (found, _, _) = map(loss, (masked, other))
    assert float(found) == float(value) and float(weight) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("max_logits", "softcap"), [(2**28, None), (128, None), (2**28, 0.2)])
def test_the_entropy_is_exact_with_any_number_of_logits(max_logits, softcap, model, rows):
    functions, params = model
    hidden = functions.hidden_states(params, rows, {}).last_hidden_state
    positions = rows["label_positions"]
    chosen = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
    unembedding = functions.unembedding(params, chosen).replace(softcap=softcap)
    log_p = jax.nn.log_softmax(unembedding.logits()[..., :96])
    expected = -np.sum(np.exp(log_p) * log_p * rows["label_weights"][..., None])
    found = entropy_sum(unembedding, rows, max_logits)
    np.testing.assert_allclose(float(found), expected, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_temperature_divides_logits_after_their_bound(softcap):
    random = np.random.default_rng(0)
    hidden, table = random.standard_normal((2, 3, 8)), random.standard_normal((128, 8))
    whole = Unembedding(jnp.float32(hidden), jnp.float32(table), None, 128, softcap)
    np.testing.assert_allclose(scaled(whole, 0.5).logits(), 0.5 * whole.logits(), rtol=1e-5)


def test_the_estimate_of_the_divergence_is_zero_for_equal_models():
    ones = np.ones((1, 2), np.float32)
    found = kl_estimate(-ones, np.array([[-1.0, -2.0]], np.float32), ones)
    np.testing.assert_allclose(found, [[0.0, np.exp(-1) - 1 + 1]], rtol=1e-6)


def test_a_pair_becomes_a_row_with_the_answer_as_its_completion():
    example = {"source_tokens": np.array([5, 6]), "target_tokens": np.array([7])}
    made = objective(kl_coefficient=0.1, batches=2)
    row = made.prepare(example, np.random.default_rng(0), VOCABULARY, LENGTH)
    assert row["input_ids"][:5].tolist() == [2, 5, 6, 7, 2]
    assert row["labels"][:2].tolist() == [7, 2]
    assert {"old_log_probs", "reference_log_probs", "advantages", "rollout/reward"} <= row.keys()
    (view,) = made.example_views(row)
    assert view.labels.tolist() == [-1, -1, -1, 7, 2]


def test_prompts_are_kept_whose_answers_are_longer_than_completions(tmp_path, caplog):
    rows = [{"a": "4+1", "b": "4 and 1 are 5"}, {"a": "4+1+1+1+1", "b": "8"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextData(
        source=PairSource(str(tmp_path / "rows.jsonl"), source_field="a", target_field="b"),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.0,
        shards=1,
    )
    spec = objective().window_spec(LENGTH)
    store = prepare(data, tmp_path / "store")
    examples = store.examples("train", spec)
    assert "1 of 2 pairs" in caplog.text and "longer than 7 tokens and are left out" in caplog.text
    example = examples.read(0, np.random.default_rng(0))
    assert len(examples) == 1 and len(example["target_tokens"]) == 13
    row = objective().prepare(example, np.random.default_rng(0), store.vocabulary, LENGTH)
    assert (row["label_weights"] > 0).sum() == COMPLETION


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="group_size is 1"):
        objective(group_size=1)
    with pytest.raises(UserError, match="leave 1 tokens for a prompt"):
        objective().window_spec(COMPLETION + 1)
    with pytest.raises(UserError, match="rewards is empty"):
        objective(rewards=())
    with pytest.raises(UserError, match="no regular expression"):
        MatchesPattern(pattern="(")
