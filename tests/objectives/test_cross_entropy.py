"""Cross-entropy against numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_transformers.objectives.cross_entropy import cross_entropy
from flax_transformers.parallel.mesh import MeshConfig, make_mesh

LOWEST = np.finfo(np.float32).min


both = jax.jit(cross_entropy)
total = jax.jit(jax.value_and_grad(lambda logits, labels: cross_entropy(logits, labels)[0].sum()))


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
    np.testing.assert_allclose(both(logits, labels)[0], nll, rtol=2e-6)
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
    right = both(logits, labels)[1]
    assert right.dtype == jnp.float32
    np.testing.assert_array_equal(right, logits.argmax(-1) == labels)
    assert 200 < right.sum() < 400


def test_any_number_of_leading_axes_will_do():
    logits, labels = draw(shape=(2, 3, 4))
    flat = both(logits.reshape(24, 16), labels.reshape(24))
    for whole, part in zip(both(logits, labels), flat, strict=True):
        np.testing.assert_array_equal(whole, part.reshape(2, 3, 4))
    assert both(logits[0, 0, 0], labels[0, 0, 0])[0].shape == ()


def test_logits_over_a_divided_vocabulary_stay_where_they_are():
    logits, labels = draw()
    mesh = make_mesh(MeshConfig(1, 1, 4), jax.devices()[:4])
    divided = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.jit(total, in_shardings=(divided, whole), out_shardings=(whole, divided))
    program = placed.lower(logits, labels).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
