"""PPO: advantages, the clipped losses, and a run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.checkpointing.manager import restore_params
from flax_transformers.errors import UserError
from flax_transformers.models.heads import Unembedding
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.post_training.reinforcement.policy import Rollouts
from flax_transformers.post_training.reinforcement.ppo import ProximalPolicy, generalized_advantages
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer
from flax_transformers.testing import assert_bit_equal
from flax_transformers.training.step import total_loss
from tests.post_training.reinforcement.online_runs import Dies, config_for, run

ROWS, TOKENS = 3, 4
LENGTHS = [4, 2, 3]
MASK = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.float32)


def objective(**changes):
    rollouts = Rollouts(rewards=(ExactAnswer(),), completion_length=TOKENS)
    return ProximalPolicy(rollouts=rollouts, **changes)


def drawn(seed=0):
    random = np.random.default_rng(seed)
    names = ("old_log_probs", "reference_log_probs", "old_values")
    arrays = {name: random.normal(0, 0.5, (ROWS, TOKENS)).astype(np.float32) for name in names}
    return arrays | {"label_weights": MASK}


def test_with_lambda_one_an_advantage_is_the_rewards_to_come_minus_the_value():
    rows = drawn()
    made = objective(gae_lambda=1.0, kl_coefficient=0.0, whiten=False)
    found = made.advantages(np.array([1.0, 2.0, 3.0]), rows)
    expected = (np.array([[1.0], [2.0], [3.0]]) - rows["old_values"]) * MASK
    np.testing.assert_allclose(found["advantages"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["returns"], MASK * [[1], [2], [3]], rtol=1e-5, atol=1e-6)


def test_with_lambda_zero_an_advantage_is_the_error_of_one_step():
    rewards, values = np.array([[0.0, 0.0, 1.0]]), np.array([[0.2, 0.5, 0.9]])
    found = generalized_advantages(rewards, values, discount=0.5, gae_lambda=0.0)
    np.testing.assert_allclose(found, [[0.25 - 0.2, 0.45 - 0.5, 0.1]])


def test_the_divergence_costs_reward_at_its_token():
    rows = drawn() | {"old_values": np.zeros((ROWS, TOKENS), np.float32)}
    made = objective(gae_lambda=1.0, kl_coefficient=0.1, whiten=False)
    found = made.advantages(np.zeros(ROWS), rows)
    kl = (rows["old_log_probs"] - rows["reference_log_probs"]) * MASK
    to_come = np.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(found["returns"], -0.1 * to_come * MASK, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["rollout/kl"], kl.sum(axis=1) / LENGTHS, rtol=1e-5)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_tokens():
    found = objective().advantages(np.array([1.0, 2.0, 3.0]), drawn())["advantages"]
    np.testing.assert_allclose(found[MASK > 0].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(found[MASK > 0].var(ddof=1), 1.0, rtol=1e-5)
    assert (found[MASK == 0] == 0).all()


def test_values_that_are_right_explain_all_variance():
    rows = drawn() | {"old_values": MASK * np.array([[1.0], [2.0], [3.0]], np.float32)}
    made = objective(kl_coefficient=0.0, whiten=False)
    found = made.advantages(np.array([1.0, 2.0, 3.0]), rows)
    np.testing.assert_allclose(found["rollout/explained_variance"], 1.0)
    np.testing.assert_allclose(found["advantages"], 0.0, atol=1e-6)


def test_the_losses_are_those_of_the_formulas():
    """Of a model whose logits and values are given, against numpy."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 1, (ROWS, TOKENS, 7)).astype(np.float32)
    values = random.normal(0, 1, (ROWS, TOKENS)).astype(np.float32)
    labels = random.integers(0, 7, (ROWS, TOKENS))
    log_probs = np.take_along_axis(
        logits - np.log(np.exp(logits).sum(-1, keepdims=True)), labels[..., None], -1
    )[..., 0]
    made = objective(clip_low=0.1, clip_high=0.2, value_clip=0.3, value_coefficient=0.5)
    rows = drawn(4)
    rows["old_log_probs"] = (log_probs + random.normal(0, 0.3, MASK.shape)).astype(np.float32)
    rows |= made.advantages(random.normal(0, 1, ROWS), rows)
    batch = rows | {
        "labels": labels,
        "label_positions": np.tile(np.arange(TOKENS), (ROWS, 1)),
        "attention_mask": np.ones((ROWS, 6), np.int32),
    }
    states = type("States", (), {"last_hidden_state": logits})
    functions = ModelFunctions(
        lambda *_: states,
        lambda params, hidden: Unembedding(hidden, jnp.eye(7), None, 7),
        lambda name, params, rngs, hidden: jnp.asarray(values),
    )
    terms = made.terms(functions, {}, batch, {})
    ratio = np.exp(log_probs - batch["old_log_probs"])
    advantages = batch["advantages"]
    policy = -np.minimum(ratio * advantages, np.clip(ratio, 0.9, 1.2) * advantages)
    near = np.clip(values, batch["old_values"] - 0.3, batch["old_values"] + 0.3)
    errors = np.maximum((values - batch["returns"]) ** 2, (near - batch["returns"]) ** 2)
    expected = (policy * MASK).sum() / MASK.sum() + 0.25 * (errors * MASK).sum() / MASK.sum()
    np.testing.assert_allclose(float(total_loss(terms)), expected, rtol=1e-5)
    clipped = (near - batch["returns"]) ** 2 > (values - batch["returns"]) ** 2
    share = np.divide(*map(float, terms.metrics["value/clipped"]))
    np.testing.assert_allclose(share, (clipped * MASK).sum() / MASK.sum(), rtol=1e-6)
    assert 0 < share < 1


def ppo_config(steps=6):
    config = config_for(steps)
    model = dataclasses.replace(config.model, architecture="LlamaForCausalLMWithValueHead")
    made = ProximalPolicy(rollouts=config.objective.rollouts)
    return dataclasses.replace(config, model=model, objective=made)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    run(ppo_config(), tmp_path / "straight")
    rows = [row for row in read_metrics(tmp_path / "straight") if "train/loss" in row]
    assert rows[0]["policy/clipped_high"] == rows[0]["policy/clipped_low"] == 0
    assert rows[0]["rollout/kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[5]["rollout/explained_variance"] <= 1.0 and rows[5]["value/loss"] > 0
    with pytest.raises(RuntimeError, match="killed"):
        run(ppo_config(), tmp_path / "killed", [Dies(5)])
    run(ppo_config(), tmp_path / "killed")
    assert_bit_equal(restore_params(tmp_path / "killed"), restore_params(tmp_path / "straight"))


@pytest.mark.usefixtures("one_device")
def test_a_model_without_values_is_refused(tmp_path):
    config = dataclasses.replace(ppo_config(), model=config_for().model)
    with pytest.raises(UserError, match="ProximalPolicy needs values, which LlamaForCausalLM"):
        run(config, tmp_path)
