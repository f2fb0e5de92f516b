"""Classifiers of frozen features."""

from __future__ import annotations

import numpy as np
import pytest

from flax_transformers.evaluation.features import classifiers
from flax_transformers.evaluation.features.classifiers import (
    _fitted,
    _loss,
    linear_probe,
    nearest_neighbours,
)


def blobs(count, seed, spread=1.0):
    """Points around three centres, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    centres = np.array([[4.0, 0, 0, 1], [0, 4, 0, 1], [0, 0, 4, 1]])
    return (centres[labels] + spread * rng.normal(size=(count, 4))).astype(np.float32), labels


def test_neighbours_vote_by_their_similarity_as_in_dino(monkeypatch):
    monkeypatch.setattr(classifiers, "_ROWS", 7)
    train, labels = blobs(60, 0, 3.0)
    test, _ = blobs(20, 1, 3.0)
    for temperature in (0.07, 1.0):
        expected = []
        for row in test:
            similar = train @ row / (np.linalg.norm(train, axis=1) * np.linalg.norm(row))
            near = np.argsort(-similar)[:5]
            votes = [np.exp(similar[near] / temperature)[labels[near] == c].sum() for c in range(3)]
            expected.append(int(np.argmax(votes)))
        found = nearest_neighbours(train, labels, test, 3, 5, temperature)
        assert found.tolist() == expected


def test_few_training_examples_all_vote():
    train = np.eye(2, dtype=np.float32)
    assert nearest_neighbours(train, np.array([1, 0]), train, 2).tolist() == [1, 0]


def test_the_gradient_is_that_of_the_loss():
    rows, labels = blobs(12, 0)
    weights = np.random.default_rng(1).normal(size=(5, 3))
    value, gradient = _loss(rows, labels, weights)
    for place in ((0, 0), (3, 2), (4, 1)):
        moved = weights.copy()
        moved[place] += 1e-6
        assert (_loss(rows, labels, moved)[0] - value) / 1e-6 == pytest.approx(
            gradient[place], abs=1e-4
        )


def test_a_fit_ends_where_the_penalised_gradient_vanishes():
    rows, labels = blobs(50, 0, 3.0)
    weights = _fitted(rows.astype(np.float64), labels, np.zeros((5, 3)), 0.1)
    _, gradient = _loss(rows, labels, weights)
    gradient[:-1] += 0.1 * weights[:-1]
    assert np.abs(gradient).max() < 1e-4


def test_a_linear_probe_separates_classes_and_needs_a_penalty_on_noise():
    train, labels = blobs(90, 0)
    test, expected = blobs(200, 1)
    predicted, _ = linear_probe(train, labels, test, 3)
    assert (predicted == expected).mean() > 0.95
    noise = np.random.default_rng(0).normal(size=(90, 60)).astype(np.float32)
    _, penalty = linear_probe(noise, labels, noise, 3)
    assert penalty == max(classifiers.PENALTIES)


def test_features_of_any_scale_and_constant_ones_give_the_same_classes():
    train, labels = blobs(60, 0)
    test, _ = blobs(30, 1)
    expected, _ = linear_probe(train, labels, test, 3)
    scale = np.array([1e-3, 1.0, 50.0, 7.0], np.float32)
    scaled = [np.c_[rows * scale, np.full(len(rows), 9.0)] for rows in (train, test)]
    assert (linear_probe(scaled[0], labels, scaled[1], 3)[0] == expected).all()


def test_one_example_of_each_class_is_enough():
    train = np.eye(3, dtype=np.float32)
    assert linear_probe(train, np.arange(3), train, 3)[0].tolist() == [0, 1, 2]
