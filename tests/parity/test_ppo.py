"""PPO against the last TRL that had it, 0.11.4: rewards by token, advantages, losses and gradients.

``make parity`` puts that release beside the environment. Its modules no longer import, so the
functions and methods compared with are taken out of its files.
"""

from __future__ import annotations

import ast
import sys
import types
import typing
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_transformers.models.heads import Unembedding
from flax_transformers.objectives.base import ModelFunctions
from flax_transformers.post_training.reinforcement.policy import Rollouts
from flax_transformers.post_training.reinforcement.ppo import ProximalPolicy
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer
from flax_transformers.testing import assert_parity
from flax_transformers.training.step import total_loss

SOURCE = Path(sys.prefix) / "trl-0.11.4" / "trl"
FUNCTIONS = {
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "clip_by_value",
    "entropy_from_logits",
    "flatten_dict",
}
METHODS = {"compute_rewards", "_kl_penalty", "compute_advantages", "loss"}
ROWS, TOKENS, WORDS = 4, 6, 11
LENGTHS = [6, 3, 1, 5]
SETTINGS = {
    "kl_coefficient": 0.05,
    "discount": 0.97,
    "gae_lambda": 0.9,
    "value_coefficient": 0.3,
    "value_clip": 0.2,
    "clip_low": 0.15,
    "clip_high": 0.15,
}

pytestmark = pytest.mark.skipif(
    not SOURCE.is_dir(), reason="TRL 0.11.4 is not installed; make parity does it"
)


def definitions(path, names):
    """The functions of these names in a file, in classes too."""
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]


@pytest.fixture(scope="module")
def theirs():
    """A trainer of TRL with its methods, and nothing else."""
    found = definitions(SOURCE / "core.py", FUNCTIONS)
    found += definitions(SOURCE / "trainer" / "ppo_trainer.py", METHODS)
    assert {function.name for function in found} == FUNCTIONS | METHODS
    for function in found:
        function.decorator_list = []
    scope = vars(typing) | {"torch": torch, "warnings": warnings}
    exec(compile(ast.fix_missing_locations(ast.Module(found, [])), "trl", "exec"), scope)
    config = types.SimpleNamespace(
        kl_penalty="kl",
        whiten_rewards=False,
        gamma=SETTINGS["discount"],
        lam=SETTINGS["gae_lambda"],
        cliprange=SETTINGS["clip_low"],
        cliprange_value=SETTINGS["value_clip"],
        vf_coef=SETTINGS["value_coefficient"],
        ratio_threshold=1e9,
    )
    trainer = types.SimpleNamespace(
        config=config, kl_ctl=types.SimpleNamespace(value=SETTINGS["kl_coefficient"])
    )
    for name in METHODS:
        setattr(trainer, name, types.MethodType(scope[name], trainer))
    return trainer


@pytest.fixture(scope="module")
def case():
    """Logits and values of a model, and a rollout of one that is not far from it."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 1, (ROWS, TOKENS, WORDS)).astype(np.float32)
    values = random.normal(0, 1, (ROWS, TOKENS)).astype(np.float32)
    labels = random.integers(0, WORDS, (ROWS, TOKENS))
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(log_probs, labels[..., None], -1)[..., 0]
    noise = random.normal(0, 0.3, (3, ROWS, TOKENS)).astype(np.float32)
    rows = {
        "labels": labels,
        "label_positions": np.tile(np.arange(TOKENS), (ROWS, 1)),
        "label_weights": (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.float32),
        "attention_mask": np.ones((ROWS, TOKENS), np.int32),
        "old_log_probs": chosen + noise[0],
        "reference_log_probs": chosen + noise[1],
        "old_values": values + noise[2],
    }
    return {"logits": logits, "values": values}, rows, random.normal(0, 1, ROWS)


OURS = ProximalPolicy(
    rollouts=Rollouts(rewards=(ExactAnswer(),), completion_length=TOKENS), **SETTINGS
)


def test_advantages_and_returns_are_those_of_trl(theirs, case):
    _, rows, rewards = case
    mask = torch.tensor(rows["label_weights"])
    by_token, _, _ = theirs.compute_rewards(
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(rows["old_log_probs"]),
        torch.tensor(rows["reference_log_probs"]),
        mask,
    )
    _, advantages, returns = theirs.compute_advantages(
        torch.tensor(rows["old_values"]), by_token, mask
    )
    found = OURS.advantages(rewards, rows)
    assert_parity(found["advantages"], advantages, where=rows["label_weights"])
    assert_parity(found["returns"], returns, where=rows["label_weights"])


def test_losses_gradients_and_statistics_are_those_of_trl(theirs, case):
    params, rows, rewards = case
    batch = rows | OURS.advantages(rewards, rows)
    states = types.SimpleNamespace
    functions = ModelFunctions(
        lambda params, batch, rngs: states(last_hidden_state=params["logits"]),
        lambda params, hidden: Unembedding(hidden, jnp.eye(WORDS), None, WORDS),
        lambda name, params, rngs, hidden: params["values"],
    )

    def loss(params):
        terms = OURS.terms(functions, params, batch, {})
        return total_loss(terms), terms.metrics

    (found, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    logits, values = (torch.tensor(array, requires_grad=True) for array in params.values())
    tensors = {name: torch.tensor(array) for name, array in batch.items()}
    chosen = torch.log_softmax(logits, -1).gather(-1, tensors["labels"][..., None])[..., 0]
    policy, value, statistics = theirs.loss(
        tensors["old_log_probs"],
        tensors["old_values"],
        logits,
        values,
        chosen,
        tensors["label_weights"],
        tensors["advantages"],
        tensors["returns"],
    )
    (policy + value).backward()
    assert_parity(found, (policy + value).item())
    assert_parity(gradients["logits"], logits.grad)
    assert_parity(gradients["values"], values.grad)
    means = {name: np.divide(*pair) for name, pair in metrics.items()}
    assert_parity(means["policy/entropy"], statistics["policy/entropy"])
    assert_parity(means["value/clipped"], statistics["val/clipfrac"])
    clipped = means["policy/clipped_low"] + means["policy/clipped_high"]
    assert_parity(clipped, statistics["policy/clipfrac"])
    assert clipped > 0 and means["value/clipped"] > 0
