"""Completions, and the loss on them, do not depend on the mesh or the number of micro-batches."""

import jax
import numpy as np
import optax
import pytest

import flax_transformers as ft
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.generation.sampling import Sampling
from flax_transformers.post_training.reinforcement.policy import (
    GroupRelativePolicy,
    Rollouts,
    completion_row,
)
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer
from flax_transformers.post_training.reinforcement.rollouts import Prompt, Sampler, undivided
from flax_transformers.testing import relative_difference
from tests.huggingface.tensors import drawn_parameters, parameter_shapes
from tests.multi_device.states import placed_state

pytestmark = pytest.mark.slow

LENGTH, COMPLETION, ROWS = 16, 6, 16
TOKENIZER = ByteTokenizer()
OBJECTIVE = GroupRelativePolicy(
    rollouts=Rollouts(rewards=(ExactAnswer(),), completion_length=COMPLETION, group_size=4),
    normalizer="dapo",
)
MODEL = LlamaConfig(
    vocab_size=262,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    max_positions=LENGTH,
    bos_id=None,
    eos_ids=(1,),
    pad_id=0,
    init_std=0.1,
)
FULL = pytest.mark.full
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 2, id="2x2x2"),
    pytest.param({"data": 1, "fsdp": 8}, 1, id="1x8x1", marks=FULL),
    pytest.param({"data": 4, "context": 2}, 4, id="context", marks=FULL),
    pytest.param({"data": 4, "tensor": 2}, 2, id="tensor", marks=FULL),
]


def sampled_and_trained(mesh, micro_batches, rows=None, gathered=False):
    """Completions of seed 0, and loss and parameters after a step on ``rows``, or on them."""
    trainer = ft.Trainer(
        model=MODEL,
        objective=OBJECTIVE,
        optimizer=optax.sgd(1.0),
        mesh=ft.make_mesh(**mesh),
        micro_batches=micro_batches,
    )
    params = drawn_parameters(trainer.model, parameter_shapes(trainer.model), lambda name: 0.1)
    state = placed_state(trainer.abstract, params)
    sampler = Sampler(
        trainer.model,
        trainer.mesh,
        TOKENIZER,
        TOKENIZER.vocabulary,
        rows=ROWS,
        prompt_length=LENGTH - COMPLETION,
        completion_length=COMPLETION,
    )
    texts = [f"sort {number}=" for number in range(98, 98 + ROWS // 4) for _ in range(4)]
    ids = [np.append(1, TOKENIZER.encode_prompt(text)).astype(np.int32) for text in texts]
    prompts = [Prompt(i, text, {}) for i, text in zip(ids, texts, strict=True)]
    params = state.params
    if gathered:
        assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(params))
        params = jax.tree.map(lambda a: jax.device_put(a, undivided(a.sharding)), params)
        assert not any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(params))
    with jax.set_mesh(trainer.mesh):
        found = sampler(params, prompts, Sampling(temperature=1.0), jax.random.key(3))
    if rows is None:
        rows = stacked(
            [
                completion_row(p.ids, c, TOKENIZER.vocabulary, LENGTH, COMPLETION)
                for p, c in zip(prompts, found.ids, strict=True)
            ]
        )
        rows["label_weights"][::3, 2:] = 0  # uneven lengths
        rows |= OBJECTIVE.advantages(np.random.default_rng(0).normal(0, 1, ROWS), rows)
    state, metrics = trainer.step(state, rows)
    return [ids.tolist() for ids in found.ids], rows, metrics, jax.device_get(state.params)


@pytest.fixture(scope="module")
def by_data():
    return sampled_and_trained({"data": 8}, 1)


@pytest.mark.parametrize(("mesh", "micro_batches"), MESHES)
def test_completions_and_updates_are_equal_on_any_mesh(mesh, micro_batches, by_data):
    ids, rows, metrics, params = by_data
    assert len({tuple(one) for one in ids}) > ROWS // 2
    found, _, theirs, updated = sampled_and_trained(mesh, micro_batches, rows, mesh["data"] == 2)
    assert found == ids
    for name in ("train/loss", "policy/entropy", "optimizer/grad_norm"):
        np.testing.assert_allclose(theirs[name], metrics[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(params), strict=True):
        assert relative_difference(a, b) < 1e-5
