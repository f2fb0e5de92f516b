"""Replaced-token detection: the draws of the generator, and the sums of the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformers.objectives import replaced_tokens
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.replaced_tokens import ReplacedTokenDetection, put
from flax_transformers.testing import relative_difference
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_model

LENGTH, WORDS = 16, 96
VOCAB = Vocabulary(WORDS, 0, unk_id=1, cls_id=2, sep_id=3, mask_id=4, special_ids=(0, 1, 2, 3, 4))
OBJECTIVE = ReplacedTokenDetection(mask_fraction=0.3)


def rows(count):
    """Prepared examples of different lengths."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(5, WORDS, 5 + 2 * seed).astype(np.int32)
        ends = np.array([len(tokens)], np.int32)
        example = {"tokens": tokens, "document_ends": ends, "sentence_ends": ends}
        made.append(OBJECTIVE.prepare(example, rng, VOCAB, LENGTH))
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


@pytest.fixture(scope="module")
def model():
    model, params = drawn_model("ElectraWithGenerator")
    params["replaced_head"]["kernel"] = params["replaced_head"]["kernel"] * 50
    return model, params


@pytest.fixture(scope="module")
def sums(model):
    """The losses and the metrics of the objective, as a compiled function."""

    def sums(params, batch):
        terms = OBJECTIVE.terms(model_functions(model[0]), params, batch, {})
        return terms.losses, terms.metrics

    return jax.jit(sums)


def test_an_entry_is_drawn_by_its_probability():
    draw = jax.jit(replaced_tokens.draw)
    logits = jnp.log(jnp.array([0.5, 1e-30, 0.25, 0.25, 1e-30]))
    draws = jnp.array([[0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-24]])
    drawn = draw(jnp.broadcast_to(logits, (1, 6, 5)), draws)
    assert drawn.tolist()[0][:5] == [0, 0, 2, 2, 3]
    assert drawn.tolist()[0][5] >= 3
    many = draw(jnp.broadcast_to(logits, (1, 1000, 5)), jnp.linspace(0, 1, 1001)[None, :-1])
    assert np.bincount(np.asarray(many)[0], minlength=4)[:4].tolist() == [500, 0, 250, 250]


def test_tokens_are_put_at_masked_positions_alone():
    batch = {
        "input_ids": np.array([[2, 4, 7, 4, 3]], np.int32),
        "masked_positions": np.array([[3, 1, 0]], np.int32),
        "masked_weights": np.array([[1.0, 1.0, 0.0]], np.float32),
    }
    assert put(batch, np.array([[9, 8, 50]])).tolist() == [[2, 8, 7, 9, 3]]


@pytest.mark.slow
def test_the_loss_is_that_of_the_paper(model, sums):
    model, params = model
    batch = rows(4)
    # Some draws are the original tokens.
    bias = params["generator"]["mlm_head"]["bias"].at[batch["masked_labels"][0, 0]].set(6.0)
    mlm_head = params["generator"]["mlm_head"] | {"bias": bias}
    params = params | {"generator": params["generator"] | {"mlm_head": mlm_head}}
    losses, metrics = sums(params, batch)
    masked = np.asarray(batch["masked_weights"]) > 0
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, batch["input_ids"], batch["attention_mask"])
    logits = np.asarray(logits.generator_logits, np.float64)
    original, corrupted = batch["input_ids"].copy(), batch["input_ids"].copy()
    generator = 0.0
    for row, at in np.argwhere(masked):
        place = batch["masked_positions"][row, at]
        probability = np.exp(logits[row, place] - logits[row, place].max())
        probability /= probability.sum()
        label = batch["masked_labels"][row, at]
        generator -= np.log(probability[label])
        original[row, place] = label
        token = np.searchsorted(np.cumsum(probability), batch["draws"][row, at], side="right")
        corrupted[row, place] = token
    replaced = (original != corrupted).astype(np.float32)
    assert 0 < replaced.sum() < masked.sum()
    output = apply({"params": params}, corrupted, batch["attention_mask"])
    loss = optax.sigmoid_binary_cross_entropy(output.logits, replaced) * batch["attention_mask"]
    (sum_g, weight_g, _), (sum_d, weight_d, times) = losses["generator"], losses["detection"]
    assert relative_difference(sum_g, np.float32(generator)) < 1e-5
    assert relative_difference(sum_d, loss.sum()) < 1e-5
    assert (weight_g, weight_d, times) == (masked.sum(), batch["attention_mask"].sum(), 50.0)
    assert metrics["replaced_share"][0] == replaced.sum()
    right = (np.asarray(output.logits) > 0) == (replaced > 0)
    assert metrics["detection_recall"] == (right[replaced > 0].sum(), replaced.sum())
    assert metrics["detection_accuracy"][0] == right[batch["attention_mask"] > 0].sum()


@pytest.mark.slow
def test_no_gradient_of_the_discriminator_reaches_the_generator(model):
    model, params = model
    batch = rows(2)

    def detection(params):
        return OBJECTIVE.terms(model_functions(model), params, batch, {}).losses["detection"][0]

    grads = jax.jit(jax.grad(detection))(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["generator"]))
    assert np.any(grads["stack"]["layers"]["block_0"]["mlp"]["up"]["kernel"])
    assert np.any(grads["words"]["embedding"])


@pytest.mark.slow
def test_two_halves_of_a_batch_add_up_to_the_whole(model, sums):
    """The rest of a half are examples of zeros, which have no weight."""
    params, batch = model[1], rows(4)
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        filled = {name: np.zeros_like(value) for name, value in batch.items()}
        for name, value in batch.items():
            filled[name][half] = value[half]
        halves.append(sums(params, filled))
    for kind, whole in enumerate(sums(params, batch)):  # losses, then metrics
        for name, (total, weight, *_) in whole.items():
            parts = [half[kind][name] for half in halves]
            assert sum(part[0] for part in parts) == pytest.approx(float(total), rel=1e-5)
            assert sum(part[1] for part in parts) == weight


def test_an_example_of_zeros_has_no_weight():
    row = {name: np.zeros_like(value[0]) for name, value in rows(1).items()}
    assert row["masked_weights"].sum() == 0 and row["attention_mask"].sum() == 0


def test_the_examples_are_those_of_masked_language_modelling_and_draws():
    batch = rows(3)
    assert batch["draws"].dtype == np.float32
    assert batch["draws"].shape == batch["masked_labels"].shape
    assert ((batch["draws"] >= 0) & (batch["draws"] < 1)).all()
