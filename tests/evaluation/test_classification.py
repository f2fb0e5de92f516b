"""Scores of classes and numbers, against definitions written out."""

from __future__ import annotations

import numpy as np

from flax_transformers.evaluation.class_report import class_scores, confusion_matrix, occurring
from flax_transformers.evaluation.classification import _class_scores, pearson


def test_macro_f1_is_the_mean_over_the_classes_that_are_there():
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 2, 1])
    # Class 0: precision 1, recall 2/3; class 1: 1/3 and 1/2; class 2: nothing right.
    expected = (0.8 + 0.4 + 0.0) / 3
    matrix = confusion_matrix(predicted, labels, 5)
    f1 = class_scores(matrix)["f1"]
    np.testing.assert_allclose(f1[occurring(matrix)].mean(), expected)


def test_f1_of_two_classes_is_that_of_the_second():
    labels = np.array([0, 0, 0, 0, 1, 1])
    predicted = np.array([0, 0, 0, 1, 1, 0])
    found = _class_scores(predicted, labels, ("no", "yes"), None)
    assert found["eval/f1"] == 0.5 and found["eval/macro_f1"] == (0.75 + 0.5) / 2
    assert "eval/f1" not in _class_scores(predicted, labels, ("a", "b", "c"), None)


def test_correlations_of_numbers_and_of_their_ranks():
    a = np.array([1.0, 2.0, 2.0, 4.0], np.float32)
    b = np.array([-3.0, 0.0, 1.0, 100.0], np.float32)
    np.testing.assert_allclose(pearson(a, b), np.corrcoef(a, b)[0, 1], rtol=1e-6)
    assert pearson(a, np.ones(4, np.float32)) == 0.0
