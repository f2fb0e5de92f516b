"""GRPO against TRL's trainer, live: losses, gradients and statistics of one tiny model."""

from __future__ import annotations

import dataclasses

import datasets
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import trl

import flax_transformers as ft
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.post_training.reinforcement.policy import (
    GroupRelativePolicy,
    Rollouts,
    completion_row,
)
from flax_transformers.post_training.reinforcement.rewards import ExactAnswer
from flax_transformers.testing import assert_parity
from flax_transformers.training.step import model_functions, total_loss

ROWS, COMPLETION, LENGTH = 4, 6, 16
TEMPERATURE = 0.7
VOCABULARY = Vocabulary(size=96, pad_id=0, eos_id=2)
NORMALIZERS = ["grpo", "bnpo", "dapo", "dr_grpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t3")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        pad_token="t0",
        eos_token="t2",
        bos_token="t1",
        unk_token="t3",
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trainer(folder, tmp_path_factory):
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=0.1,
        epsilon=0.15,
        epsilon_high=0.3,
        temperature=TEMPERATURE,
        per_device_train_batch_size=ROWS,
        num_generations=2,
        max_completion_length=COMPLETION,
        report_to=[],
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    made = trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["t5 t6"] * ROWS}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


@pytest.fixture(scope="module")
def case():
    """Prompts and completions of several lengths, with log-probabilities of other models."""
    random = np.random.default_rng(2)
    prompts = [random.integers(4, 96, n) for n in (5, 3, 4, 5)]
    completions = [random.integers(4, 96, n) for n in (6, 4, 1, 3)]
    rows = stacked(
        [
            completion_row(prompt, completion, VOCABULARY, LENGTH, COMPLETION)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )
    noise = random.normal(0, 0.4, (2, ROWS, COMPLETION)).astype(np.float32)
    return prompts, completions, rows, noise, random.normal(0, 1, ROWS).astype(np.float32)


def objective(normalizer, **changes):
    rollouts = Rollouts(
        rewards=(ExactAnswer(),),
        completion_length=COMPLETION,
        group_size=2,
        temperature=TEMPERATURE,
        batches=2,
    )
    made = GroupRelativePolicy(
        rollouts=rollouts,
        normalizer=normalizer,
        clip_low=0.15,
        clip_high=0.3,
        kl_coefficient=0.1,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def ours(folder):
    model, params = ft.load_pretrained(folder)
    return model_functions(model), params


@pytest.fixture(scope="module")
def batch(ours, case):
    """Rows with log-probabilities near those of the model, so that some ratios are clipped."""
    functions, params = ours
    _, _, rows, noise, advantages = case
    log_probs, _ = objective("grpo").log_probs(functions, params, rows)
    old, reference = np.asarray(log_probs)[None] + noise
    return rows | {
        "advantages": advantages,
        "old_log_probs": old,
        "reference_log_probs": reference,
    }


@pytest.fixture(scope="module")
def inputs(case, batch):
    """The same for TRL, with prompts padded on the left and completions on the right."""
    prompts, completions, _, _, _ = case
    prompt_ids, prompt_mask = np.zeros((2, ROWS, 5), np.int64)
    completion_ids, completion_mask = np.zeros((2, ROWS, COMPLETION), np.int64)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        prompt_ids[row, 5 - len(prompt) :], prompt_mask[row, 5 - len(prompt) :] = prompt, 1
        completion_ids[row, : len(completion)] = completion
        completion_mask[row, : len(completion)] = 1
    arrays = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_log_probs"],
        "ref_per_token_logps": batch["reference_log_probs"],
        "num_items_in_batch": np.float32(completion_mask.sum()),
    }
    return {name: torch.tensor(array) for name, array in arrays.items()}


def gradients_in_our_layout(model, folder):
    """The gradients of a torch model, read by us as the parameters of a saved one."""
    with torch.no_grad():
        values = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
        model.save_pretrained(folder)
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
    return ft.load_pretrained(folder)[1]


@pytest.mark.parametrize(
    ("normalizer", "unbiased_kl"), [*((name, True) for name in NORMALIZERS), ("grpo", False)]
)
def test_loss_and_gradients_are_those_of_trl(
    normalizer, unbiased_kl, trainer, ours, batch, inputs, tmp_path
):
    trainer.loss_type = normalizer
    trainer.args.use_bias_correction_kl = unbiased_kl
    trainer.model.zero_grad()
    # A scale that dapo divides by, for generation batches of several steps; here it is one.
    trainer.args.steps_per_generation = 1
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    functions, params = ours

    def loss(params):
        made = objective(normalizer, unbiased_kl=unbiased_kl)
        terms = made.terms(functions, params, batch, {})
        return total_loss(terms), terms.metrics

    (found, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    assert_parity(found, expected.item())
    assert_parity(np.divide(*metrics["loss"]), expected.item())
    theirs = gradients_in_our_layout(trainer.model, tmp_path)
    jax.tree.map(assert_parity, gradients, theirs)


def test_statistics_are_those_of_trl(trainer, ours, batch, inputs):
    functions, params = ours
    trainer.loss_type, trainer.args.use_bias_correction_kl = "grpo", True
    trainer._metrics["train"].clear()
    trainer._compute_loss(trainer.model, inputs)
    found = {
        name: float(total / count)
        for name, (total, count) in objective("grpo")
        .terms(functions, params, batch, {})
        .metrics.items()
    }
    names = {
        "kl": "policy/kl",
        "entropy": "policy/entropy",
        "clip_ratio/low_mean": "policy/clipped_low",
        "clip_ratio/high_mean": "policy/clipped_high",
    }
    for theirs, ours_ in names.items():
        assert_parity(found[ours_], trainer._metrics["train"][theirs][0])
        assert found[ours_] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale):
    """TRL computes them in the middle of sampling: its lines for a sum of rewards, in torch."""
    random = np.random.default_rng(1)
    rewards = random.normal(0, 1, 12).astype(np.float32)
    rewards[:4] = 0.5  # a group without a signal
    grouped = torch.tensor(rewards).view(-1, 4)
    std = trl.trainer.utils.nanstd(grouped, dim=1).repeat_interleave(4)
    if scale == "batch":
        std = trl.trainer.utils.nanstd(grouped.view(-1))
    expected = torch.tensor(rewards) - grouped.mean(dim=1).repeat_interleave(4)
    if scale != "none":
        expected = expected / (std + 1e-4)
    rollouts = dataclasses.replace(objective("grpo").rollouts, group_size=4)
    found = objective("grpo", rollouts=rollouts, scale_rewards=scale).advantages(rewards, {})
    assert_parity(found["advantages"], expected)
