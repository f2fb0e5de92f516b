"""Cross-entropy against numpy in float64."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_transformers.models.heads import Unembedding
from flax_transformers.objectives.base import LossTerms, ModelFunctions
from flax_transformers.objectives.cross_entropy import cross_entropy, lm_scores
from flax_transformers.objectives.lm_loss import PALM_Z_LOSS, LMLoss
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES

LOWEST = np.finfo(np.float32).min


scores = jax.jit(cross_entropy)
total = jax.jit(jax.value_and_grad(lambda logits, labels: cross_entropy(logits, labels).nll.sum()))


def reference(logits, labels):
    """Negative log-likelihoods and softmax, float64."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probabilities, labels[..., None], -1)[..., 0]
    return -np.log(picked), probabilities


def draw(shape=(3, 5), vocabulary=11, padded=16, scale=4.0):
    """Logits [*shape, padded] with the lowest float32 beyond the vocabulary, and labels."""
    rng = np.random.default_rng(0)
    logits = np.full((*shape, padded), LOWEST, np.float32)
    logits[..., :vocabulary] = rng.normal(0, scale, (*shape, vocabulary))
    return logits, rng.integers(0, vocabulary, shape)


def test_values_and_gradients_are_numpys_with_a_padded_vocabulary():
    logits, labels = draw()
    nll, probabilities = reference(logits, labels)
    found, gradient = total(logits, labels)
    np.testing.assert_allclose(scores(logits, labels).nll, nll, rtol=2e-6)
    np.testing.assert_allclose(found, nll.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, probabilities - np.eye(16)[labels], atol=1e-6)
    assert not np.asarray(gradient)[..., 11:].any()


def test_large_logits_overflow_nothing():
    logits = np.array([[999, -999, 0.0, LOWEST], [-999, -999, -999, LOWEST]], np.float32)
    labels = np.array([0, 1])
    value, gradient = total(logits, labels)
    np.testing.assert_allclose(value, np.log(3.0), rtol=1e-4)
    np.testing.assert_allclose(gradient, [[0, 0, 0, 0], [1 / 3, -2 / 3, 1 / 3, 0]], atol=1e-6)


def test_accuracy_says_where_the_label_has_the_highest_logit():
    logits, labels = draw(shape=(400,), scale=1.0)
    labels[::2] = logits[::2].argmax(-1)
    right = scores(logits, labels).correct
    assert right.dtype == jnp.float32
    np.testing.assert_array_equal(right, logits.argmax(-1) == labels)
    assert 200 < right.sum() < 400


def test_a_tie_for_the_highest_logit_is_not_correct():
    logits = np.array([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 3.0, 2.0]])
    labels = np.array([0, 1, 0, 1])
    assert scores(logits.astype(np.float32), labels).correct.tolist() == [0, 0, 0, 1]


def test_logits_that_are_no_numbers_are_never_correct():
    assert scores(np.full((1, 3), np.nan, np.float32), np.array([1])).correct.tolist() == [0]


def test_label_smoothing_is_the_cross_entropy_of_a_smoothed_target():
    logits, labels = draw()
    real = logits[..., :11].astype(np.float64)
    log_p = real - np.log(np.exp(real).sum(-1, keepdims=True))
    target = 0.9 * np.eye(11)[labels] + 0.1 / 11  # padding of the vocabulary has no share
    expected = -(target * log_p).sum(-1)
    np.testing.assert_allclose(scores(logits, labels).smoothed(0.1), expected, rtol=2e-6)

    # T5X and tensor2tensor: 0.9 at the label, 0.1 / 10 at each of the others.
    target = np.where(np.eye(11)[labels] > 0, 0.9, 0.1 / 10)
    expected = -(target * log_p).sum(-1)
    found = scores(logits, labels).smoothed(0.1 * 11 / 10)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_without_label_smoothing_the_plain_loss_is_trained():
    found = scores(*draw())
    np.testing.assert_array_equal(found.smoothed(0.0), found.nll)


def test_log_z_is_that_of_all_logits():
    logits, labels = draw()
    expected = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(scores(logits, labels).log_z, expected, rtol=1e-6)


def test_any_number_of_leading_axes_will_do():
    logits, labels = draw(shape=(2, 3, 4))
    flat = scores(logits.reshape(24, 16), labels.reshape(24))
    for whole, part in zip(scores(logits, labels), flat, strict=True):
        np.testing.assert_array_equal(whole, part.reshape(2, 3, 4))
    assert scores(logits[0, 0, 0], labels[0, 0, 0]).nll.shape == ()


def test_logits_over_a_divided_vocabulary_stay_where_they_are():
    logits, labels = draw()
    mesh = make_mesh(MeshConfig(1, 1, 4), jax.devices()[:4])
    divided = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())

    @jax.value_and_grad
    def everything(logits, labels):
        found = cross_entropy(logits, labels)
        return jnp.sum(found.smoothed(0.1) + found.log_z**2 + found.correct)

    placed = jax.jit(everything, in_shardings=(divided, whole), out_shardings=(whole, divided))
    program = placed.lower(logits, labels).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program


WIDTH, VOCABULARY, PADDED = 8, 600, 640


def draw_words(batch=2, length=12):
    """Hidden states, a table and a bias of its words, labels."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(0, 1, (batch, length, WIDTH)).astype(np.float32)
    table = rng.normal(0, 1, (PADDED, WIDTH)).astype(np.float32)
    bias = rng.normal(0, 1, PADDED).astype(np.float32)
    return hidden, table, bias, rng.integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def weighed(held, with_bias=True, softcap=None):
    """All scores, and a loss of all of them that differs by place, as a function that also
    differentiates."""

    def loss(hidden, table, bias, labels):
        words = Unembedding(hidden, table, bias if with_bias else None, VOCABULARY, softcap)
        scores = lm_scores(words, labels, held)
        each = jnp.arange(labels.size, dtype=jnp.float32).reshape(labels.shape) / labels.size
        loss = scores.smoothed(0.1) * each + 0.01 * scores.log_z**2 + scores.mean_nll * each**2
        return jnp.sum(loss), scores

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.mark.parametrize("held", [24 * 128, 24 * 256, 24 * 639])
@pytest.mark.parametrize(("with_bias", "softcap"), [(True, None), (False, None), (True, 3.0)])
def test_chunks_of_the_vocabulary_give_the_scores_and_gradients_of_the_whole(
    held, with_bias, softcap
):
    arrays = draw_words()
    arrays[3][0, :2] = np.argmax(arrays[0][0, :2] @ arrays[1][:VOCABULARY].T + arrays[2][:600], -1)
    whole = jax.jit(weighed(24 * PADDED, with_bias, softcap))(*arrays)
    blocks = jax.jit(weighed(held, with_bias, softcap))(*arrays)
    assert sum(np.asarray(whole[0][1].correct).ravel()) >= (2 if with_bias else 0)
    for found, expected in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_a_tie_between_blocks_is_not_correct():
    table = np.zeros((PADDED, 1), np.float32)
    table[[3, 7, 500, 599]] = [[2.0], [1.0], [2.0], [3.0]]
    hidden = np.array([[[1.0], [-1.0]], [[1.0], [1.0]]], np.float32)
    labels = np.array([[3, 3], [599, 500]], np.int32)
    words = Unembedding(hidden, table, None, VOCABULARY)
    assert lm_scores(words, labels, 4 * 128).correct.tolist() == [[0, 0], [1, 0]]
    words = words.replace(table_VD=np.where(table == 3.0, 2.0, table))
    assert lm_scores(words, labels, 4 * 128).correct.tolist() == [[0, 0], [0, 0]]


@pytest.mark.slow
def test_blocks_of_a_divided_vocabulary_stay_where_they_are():
    mesh, arrays = make_mesh(MeshConfig(1, 2, 4), jax.devices()), draw_words(length=24)
    by_word, by_row = PartitionSpec("tensor", "fsdp"), PartitionSpec("fsdp")
    specs = by_row, by_word, PartitionSpec("tensor"), by_row
    placed = [NamedSharding(mesh, spec) for spec in specs]

    def ruled(*arrays):
        with nn.logical_axis_rules(RULES):
            return weighed(24 * 128)(*arrays)

    with jax.set_mesh(mesh):
        program = jax.jit(ruled, in_shardings=placed).lower(*arrays).compile()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.as_text())
    # One block of a division's words at a time, whole rows: [1, 128, 8]. Never logits.
    assert gathered and all(np.prod([int(n) for n in g.split(",")]) <= 128 * 8 for g in gathered)
    expected = jax.jit(weighed(48 * PADDED))(*arrays)
    found = program(
        *(jax.device_put(a, sharding) for a, sharding in zip(arrays, placed, strict=True))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def shapes_in(jaxpr):
    """Shapes of all values of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield tuple(value.aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize(("held", "words"), [(24 * PADDED, PADDED), (24 * 128, 128)])
def test_logits_of_the_whole_vocabulary_are_never_in_memory_at_once(held, words):
    program = jax.make_jaxpr(weighed(held))(*draw_words())
    places = [shape for shape in shapes_in(program.jaxpr) if shape[:2] == (2, 12)]
    assert max(int(np.prod(shape[2:])) for shape in places) == words


@pytest.mark.slow
def test_chunks_of_the_vocabulary_take_less_memory():
    arrays = draw_words(batch=64, length=64)
    whole, blocks = (
        jax.jit(weighed(held)).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
        for held in (64 * 64 * PADDED, 64 * 64 * 128)
    )
    assert blocks < whole / 2


WEIGHTS = (np.random.default_rng(2).random((2, 12)) < 0.7).astype(np.float32)


def linear_model():
    """Functions of a model whose hidden states come in the batch and whose parameter is a table."""
    return ModelFunctions(None, lambda table, hidden: Unembedding(hidden, table, None, 600), None)


def terms_of(loss):
    hidden, table, _, labels = draw_words()

    def terms(table, hidden, labels):
        found = loss.lm_terms("words", linear_model(), table, hidden, labels, WEIGHTS)
        return found.losses, found.metrics

    return LossTerms(*jax.device_get(jax.jit(terms)(table, hidden, labels)))


@pytest.mark.slow
def test_the_logged_loss_is_plain_cross_entropy_for_any_loss():
    plain = terms_of(LMLoss())
    trained = terms_of(LMLoss(label_smoothing=0.1, z_loss=PALM_Z_LOSS, max_logits=24 * 128))
    assert set(plain.losses) == {"words"} and set(trained.losses) == {"words", "z_loss"}
    np.testing.assert_allclose(trained.metrics["loss"], plain.metrics["loss"], rtol=1e-6)
    np.testing.assert_array_equal(trained.metrics["accuracy"], plain.metrics["accuracy"])
    assert trained.losses["words"][0] > plain.losses["words"][0] == plain.metrics["loss"][0]


def test_the_z_loss_is_the_mean_of_the_squared_log_of_z():
    hidden, table, *_ = draw_words()
    total, weight, coefficient = terms_of(LMLoss(z_loss=PALM_Z_LOSS)).losses["z_loss"]
    log_z = np.log(np.exp(hidden.astype(np.float64) @ table[:VOCABULARY].T).sum(-1))
    np.testing.assert_allclose(total, (log_z**2 * WEIGHTS).sum(), rtol=1e-5)
    assert weight == WEIGHTS.sum()
    assert coefficient == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0},
                 {"z_loss": float("nan")}, {"max_logits": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"objective.{next(iter(settings))} is"):
        LMLoss(**settings)
