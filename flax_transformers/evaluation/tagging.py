"""Scores and baselines of token classification."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import Baseline, majority_class
from flax_transformers.evaluation.class_report import ClassReport, confusion_matrix
from flax_transformers.evaluation.held_out import Reader
from flax_transformers.training.callbacks import Snapshot
from flax_transformers.training.config import TrainConfig

Entity = tuple[str, int, int]
"""Type, index of the first word, and index after the last word."""


def entity_reader(
    config: TrainConfig, prepared: PreparedText, report: ClassReport | None = None
) -> Reader | None:
    """A reader of predictions: ``{"eval/entity_f1", "eval/entity_precision",
    "eval/entity_recall"}`` over all held-out sentences, for IOB2 tags; nothing for other tags. The
    tags of words go to the ``report``, if any. None for other tags without a report.
    """
    names = prepared.label_names
    if not is_iob2(names) and report is None:
        return None

    def read(snapshot: Snapshot, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, float]:
        spec = config.objective.window_spec(snapshot.phase.sequence_length)
        examples = prepared.examples("validation", spec)
        assert isinstance(examples, LabelledExamples)
        tags = tagged_words(batches, examples).values()
        if report is not None:
            ours, theirs = (
                np.array([tag for sentence in tags for tag in sentence[side]], np.int64)
                for side in (0, 1)
            )
            report.write(confusion_matrix(ours, theirs, len(names)), names)
        if not is_iob2(names):
            return {}
        guessed, true = (
            [[names[tag] for tag in sentence[side]] for sentence in tags] for side in (0, 1)
        )
        return {
            f"eval/entity_{name}": score for name, score in entity_scores(guessed, true).items()
        }

    return read


def tagged_words(
    batches: Iterable[dict[str, np.ndarray]], examples: LabelledExamples
) -> dict[int, tuple[list[int], list[int]]]:
    """The predicted and the true tags of the words of each sentence, by its number.

    ``batches``: the objective's predictions for ``examples``, in order.
    """
    found: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for batch in batches:
        for row, number in enumerate(batch["example_id"].tolist()):
            both = found[examples.document_of(number)]  # a long sentence has several rows
            words = batch["weights"][row] > 0
            for tags, values in zip(both, (batch["predicted"], batch["labels"]), strict=True):
                tags += values[row][words].tolist()
    return dict(found)


def is_iob2(names: Sequence[str]) -> bool:
    """Whether tags are "O" and others that begin with "B-" or "I-"."""
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, as conlleval and seqeval's default mode define them.

    An entity begins at "B-", and at an "I-" that does not continue an entity of its type.
    """
    found: list[Entity] = []
    kind, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        continues = tag == f"I-{kind}" and kind != ""
        if continues:
            continue
        if kind:
            found.append((kind, start, position))
        kind, start = tag[2:], position
    return found


def entity_scores(
    guessed: Iterable[Sequence[str]], true: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Micro-averaged ``f1``, ``precision`` and ``recall`` of entities; 0 where there are none."""
    right = found = wanted = 0
    for guess, truth in zip(guessed, true, strict=True):
        ours, theirs = set(entities(guess)), set(entities(truth))
        right, found, wanted = right + len(ours & theirs), found + len(ours), wanted + len(theirs)
    return {
        "f1": 2 * right / max(1, found + wanted),
        "precision": right / max(1, found),
        "recall": right / max(1, wanted),
    }


def tagging_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The most frequent tag of the training words. None where only some examples are scored."""
    assert prepared.validation is not None
    if prepared.train.label_kind != "tags":  # refused when the run begins
        return []
    if config.evaluation.max_examples is not None:
        return []
    labels = prepared.train.all_labels, prepared.validation.all_labels
    return [majority_class(config, *labels, "held-out words")]
