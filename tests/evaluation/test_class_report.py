"""Scores of classes, against those that scikit-learn 1.9 gives for the same predictions."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath
from matplotlib.image import imread

from flax_transformers.evaluation.class_report import (
    ClassReport,
    class_scores,
    confusion_matrix,
    matthews,
    report_text,
)

TRUE = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
FOUND = np.array([0, 0, 1, 2, 1, 1, 0, 2, 2, 2, 1, 2])
MATRIX = confusion_matrix(FOUND, TRUE, 4)


def test_a_matrix_counts_predictions_by_true_class():
    assert MATRIX.tolist() == [[2, 1, 1, 0], [1, 2, 0, 0], [0, 1, 4, 0], [0, 0, 0, 0]]


def test_scores_of_classes_are_those_of_scikit_learn():
    found = class_scores(MATRIX)
    np.testing.assert_allclose(found["precision"], [2 / 3, 0.5, 0.8, 0.0])
    np.testing.assert_allclose(found["recall"], [0.5, 2 / 3, 0.8, 0.0])
    np.testing.assert_allclose(found["f1"], [4 / 7, 4 / 7, 0.8, 0.0])
    assert found["support"].tolist() == [4, 3, 5, 0]


def test_matthews_correlation_is_that_of_scikit_learn():
    assert matthews(MATRIX) == pytest.approx(0.5)
    true, found = np.array([0, 1, 1, 0, 1, 0, 1, 1]), np.array([0, 1, 0, 0, 1, 1, 1, 1])
    assert matthews(confusion_matrix(found, true, 2)) == pytest.approx(0.4666666666666667)
    assert matthews(confusion_matrix(np.zeros(8, int), true, 2)) == 0.0


def test_averages_leave_out_classes_that_do_not_occur():
    lines = report_text(MATRIX, ("cat", "dog", "bird", "none")).splitlines()
    assert lines[1].split() == ["cat", "0.6667", "0.5000", "0.5714", "4"]
    assert lines[4].split() == ["none", "0.0000", "0.0000", "0.0000", "0"]
    assert lines[5].split() == ["macro", "average", "0.6556", "0.6556", "0.6476", "12"]
    assert lines[6].split() == ["weighted", "average", "0.6806", "0.6667", "0.6667", "12"]
    assert lines[7] == "accuracy 0.6667, Matthews correlation 0.5000"
    assert lines[-3].split() == ["dog", "1", "2", "0", "0"]


def test_of_many_classes_the_most_frequent_confusions_are_shown():
    matrix = np.diag(np.full(30, 5))
    matrix[3, 7] = 4
    matrix[9, 2] = 6
    lines = report_text(matrix, [f"class{n}" for n in range(30)]).splitlines()
    assert lines[-3] == "most frequent confusions (true class: predicted class)"
    assert lines[-2:] == ["    6  class9: class2", "    4  class3: class7"]


def test_a_report_is_text_and_a_picture(tmp_path, caplog):
    report = ClassReport(epath.Path(tmp_path) / "evaluation" / "step_00000005")
    names = ("cat", "a class whose name is rather long", "bird", "none")
    with caplog.at_level("INFO"):
        report.of_part("de").write(MATRIX, names)
    text = (tmp_path / "evaluation" / "step_00000005.de.classes.txt").read_text()
    assert "a class whose name is..." in text and text.strip() in caplog.text
    picture = imread(tmp_path / "evaluation" / "step_00000005.de.confusion.png")
    assert picture.ndim == 3 and picture.std() > 0.05
    ClassReport().write(MATRIX, names)
    assert len(list(tmp_path.rglob("*.*"))) == 2


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "evaluation").write_text("in the way")
    with caplog.at_level("INFO"):
        ClassReport(epath.Path(tmp_path) / "evaluation" / "step_5").write(MATRIX, list("abcd"))
    assert "accuracy" in caplog.text and "is only printed" in caplog.text
