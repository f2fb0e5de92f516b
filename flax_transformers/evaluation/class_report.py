"""Scores of each class, and the confusion matrix, as text and as a picture.

A matrix int64 [C, C] counts examples by their true class (rows) and the predicted one (columns). A
score whose denominator is zero is 0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from flax_transformers.errors import UserError
from flax_transformers.storage.workdir import set_aside_unusable, write_bytes, write_side_file

log = logging.getLogger(__name__)

_MOST_COLUMNS, _MOST_NAMES, _MOST_PAIRS = 20, 40, 20
_NAME = 24
"""Longest name of a class that is shown whole."""


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The matrix of ``predicted`` and true ``labels``, integers [n] below ``classes``."""
    places = labels.astype(np.int64) * classes + predicted
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)


def class_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """``precision``, ``recall``, ``f1`` float64 [C], and ``support`` int64 [C], the number of
    examples of each class."""
    right, support, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return {
        "precision": right / np.maximum(found, 1),
        "recall": right / np.maximum(support, 1),
        "f1": 2 * right / np.maximum(support + found, 1),
        "support": support,
    }


def occurring(matrix: np.ndarray) -> np.ndarray:
    """Whether an example is of each class, or predicted as it: bool [C]."""
    return (matrix.sum(0) + matrix.sum(1)) > 0


def matthews(matrix: np.ndarray) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin, 2004); 0 if all
    examples are of one class, or are predicted as one."""
    counts = matrix.astype(np.float64)
    total, true, found = counts.sum(), counts.sum(1), counts.sum(0)
    scale = np.sqrt((total**2 - true @ true) * (total**2 - found @ found))
    return float((np.trace(counts) * total - true @ found) / scale) if scale > 0 else 0.0


def report_text(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A line for each class, the mean over the classes that occur (macro average) and the mean by
    support (weighted average); then the confusion matrix or, of many classes, the most frequent
    confusions."""
    scores = class_scores(matrix)
    support = scores["support"]
    measures = [scores[name] for name in ("precision", "recall", "f1")]
    weights = support / max(1, int(support.sum()))
    occurs = occurring(matrix)
    means = [float(m[occurs].mean()) if occurs.any() else 0.0 for m in measures]
    shown = [_cut(name) for name in names]
    width = max(map(len, [*shown, "weighted average"]))
    lines = [f"{'':{width}}  precision  recall      f1  support"]
    rows = [(name, [m[i] for m in measures], support[i]) for i, name in enumerate(shown)]
    rows.append(("macro average", means, support.sum()))
    rows.append(("weighted average", [m @ weights for m in measures], support.sum()))
    for name, (precision, recall, f1), count in rows:
        lines.append(f"{name:{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {count:7d}")
    right = np.trace(matrix) / max(1, int(matrix.sum()))
    lines += [f"accuracy {right:.4f}, Matthews correlation {matthews(matrix):.4f}", ""]
    few = len(names) <= _MOST_COLUMNS
    return "\n".join(lines + (_table(matrix, shown) if few else _confusions(matrix, shown)))


def _table(matrix: np.ndarray, names: Sequence[str]) -> list[str]:
    width = max(map(len, names))
    cells = [max(len(name), len(str(matrix[:, i].max()))) for i, name in enumerate(names)]
    lines = ["confusion matrix (rows: true class, columns: predicted class)"]
    lines.append(" " * width + "".join(f"  {n:>{c}}" for n, c in zip(names, cells, strict=True)))
    for name, row in zip(names, matrix.tolist(), strict=True):
        counts = "".join(f"  {count:{c}d}" for count, c in zip(row, cells, strict=True))
        lines.append(f"{name:{width}}{counts}")
    return lines


def _confusions(matrix: np.ndarray, names: Sequence[str]) -> list[str]:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    return ["most frequent confusions (true class: predicted class)"] + [
        f"{wrong[true, found]:5d}  {names[true]}: {names[found]}" for true, found in pairs
    ]


def _cut(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."


def report_picture(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """The confusion matrix as PNG: each row by its share of the true class."""
    from matplotlib.figure import Figure  # slow to import

    from flax_transformers.monitoring.plots import png_of

    side = min(24.0, 3.0 + 0.32 * len(names))
    figure = Figure(figsize=(side + 1.0, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the true class")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= _MOST_NAMES:
        shown = [_cut(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90)
        axes.set_yticks(range(len(names)), shown)
    if len(names) <= _MOST_COLUMNS:
        for true, found in np.argwhere(matrix > 0).tolist():
            color = "white" if shares[true, found] > 0.5 else "black"
            count = str(matrix[true, found])
            axes.text(found, true, count, ha="center", va="center", color=color, fontsize=8)
    return png_of(figure)


@dataclass(frozen=True)
class ClassReport:
    """Where reports go: to the log, and to ``PREFIX.classes.txt`` and ``PREFIX.confusion.png``
    unless the ``prefix`` is None. ``part``: the data that is scored, for the log."""

    prefix: epath.Path | None = None
    part: str = ""

    def of_part(self, part: str) -> ClassReport:
        """That of a component of a mixture, or of an evaluation set."""
        if self.prefix is None or not part:
            return ClassReport(self.prefix, part)
        return ClassReport(self.prefix.parent / f"{self.prefix.name}.{part}", part)

    def write(self, matrix: np.ndarray, names: Sequence[str]) -> None:
        """Reports a confusion matrix. A file that cannot be written is a warning: the scores of the
        evaluation are still to be printed."""
        if jax.process_index() != 0:
            return
        text = report_text(matrix, names)
        log.info("%s%s\n", f"{self.part}:\n" if self.part else "", text)
        if self.prefix is None:
            return
        folder, name = self.prefix.parent, self.prefix.name
        picture = folder / f"{name}.confusion.png"
        try:
            write_side_file(folder / f"{name}.classes.txt", text + "\n")
            set_aside_unusable(picture)
            write_bytes(picture, report_picture(matrix, names))
        except UserError as error:
            log.warning("the report of the classes is only printed: %s", error)
        else:
            log.info("confusion matrix: %s", picture)
