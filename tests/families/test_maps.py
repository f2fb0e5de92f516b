"""Batch norm: groups of images, micro-batches, and what the running statistics move by."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_transformers.families._maps import BatchNorm, BatchNormConfig
from flax_transformers.ranges import OutOfRange

EPS = 0.5
X = np.random.default_rng(0).normal(3.0, 2.0, (8, 2, 3, 5)).astype(np.float32)


def apply(x, rows, momentum=0.25, training=True, **changed):
    """The output, and the movements of mean and variance."""
    layer = BatchNorm(BatchNormConfig(rows=rows, momentum=momentum), EPS, np.float32)
    params = jax.tree.map(
        lambda leaf: leaf.unbox(),
        layer.init(jax.random.key(0), x, deterministic=True)["params"],
        is_leaf=lambda leaf: hasattr(leaf, "unbox"),
    )
    params |= changed

    def total(params):
        y = layer.apply({"params": params}, x, deterministic=not training)
        return (y * y).sum(), y

    grads, y = jax.grad(total, has_aux=True)(params)
    return np.asarray(y), np.asarray(grads["mean"]), np.asarray(grads["variance"])


def test_each_group_is_normalised_by_its_own_statistics():
    y, _, _ = apply(X, rows=2)
    for group in range(4):  # images group and group + 4
        own = X[group::4].astype(np.float64)
        mean, variance = own.mean((0, 1, 2)), own.var((0, 1, 2))
        np.testing.assert_allclose(y[group::4], (own - mean) / np.sqrt(variance + EPS), atol=1e-5)


def test_running_statistics_do_not_count_as_changes_of_an_evaluation():
    _, mean, variance = apply(X, rows=2, training=False)
    assert not mean.any() and not variance.any()


def test_running_statistics_move_to_the_means_over_groups():
    old = {"mean": np.full(5, 2.0, np.float32), "variance": np.full(5, 7.0, np.float32)}
    _, mean, variance = apply(X, rows=2, **old)
    groups = [X[group::4].astype(np.float64) for group in range(4)]
    means = np.mean([one.mean((0, 1, 2)) for one in groups], axis=0)
    variances = np.mean([one.var((0, 1, 2), ddof=1) for one in groups], axis=0)
    np.testing.assert_allclose(mean, 0.25 * (means - 2.0), atol=1e-5)
    np.testing.assert_allclose(variance, 0.25 * (variances - 7.0), atol=1e-5)


def test_two_micro_batches_have_the_groups_of_the_whole_batch():
    whole = apply(X, rows=2)
    halves = [apply(X[k::2], rows=2) for k in range(2)]
    for k, (y, _, _) in enumerate(halves):
        np.testing.assert_allclose(y, whole[0][k::2], atol=1e-6)
    for place in (1, 2):
        np.testing.assert_allclose(
            np.mean([half[place] for half in halves], axis=0), whole[place], atol=1e-6
        )


def test_the_movements_of_two_applications_add_up():
    layer = BatchNorm(BatchNormConfig(rows=4, momentum=0.25), EPS, np.float32)
    fresh = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "variance": 1.0}
    params = {name: np.full(5, value, np.float32) for name, value in fresh.items()}

    def total(params, *batches):
        applied = (layer.apply({"params": params}, x, deterministic=False) for x in batches)
        return sum(y.sum() for y in applied)

    one, other, both = (jax.grad(total)(params, *each) for each in ([X], [X + 1], [X, X + 1]))
    for name in ("mean", "variance"):
        np.testing.assert_allclose(both[name], one[name] + other[name], rtol=1e-5)


def test_statistics_of_values_far_from_zero_are_exact():
    far = (X + np.float32(3000)).astype(np.float32)
    _, _, variance = apply(far, rows=8, momentum=1.0)
    wanted = far.astype(np.float64).var((0, 1, 2), ddof=1) - 1.0
    np.testing.assert_allclose(variance, wanted, rtol=1e-4)


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    with pytest.raises(
        OutOfRange, match=r"batch_norm.rows is 3, which does not divide the 8 images"
    ):
        apply(X, rows=3)
