"""Scores and baselines of token classification."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import Baseline, all_labels, majority_class
from flax_transformers.evaluation.predictions import held_out_predictions
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig

Entity = tuple[str, int, int]
"""Type, index of the first word, and index after the last word."""


def entity_evaluator(config: TrainConfig, prepared: PreparedText) -> Evaluator:
    """A function of a snapshot: ``{"eval/entity_f1", "eval/entity_precision",
    "eval/entity_recall"}`` over all held-out sentences, for IOB2 tags; nothing for other tags.
    """
    names = prepared.label_names
    if not is_iob2(names):
        return lambda _: {}
    predictions = held_out_predictions(config, prepared)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        spec = config.objective.window_spec(snapshot.phase.sequence_length)
        examples = prepared.examples("validation", spec)
        assert isinstance(examples, LabelledExamples)
        guessed: dict[int, list[str]] = defaultdict(list)
        true: dict[int, list[str]] = defaultdict(list)
        for batch in predictions(snapshot):
            for row, number in enumerate(batch["example_id"].tolist()):
                document = examples.document_of(number)  # a long sentence has several rows
                words = batch["weights"][row] > 0
                for tags, values in ((guessed, batch["predicted"]), (true, batch["labels"])):
                    tags[document] += [names[tag] for tag in values[row][words].tolist()]
        return {
            f"eval/entity_{name}": score
            for name, score in entity_scores(guessed.values(), true.values()).items()
        }

    return evaluate


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
    labels = all_labels(prepared.train), all_labels(prepared.validation)
    return [majority_class(config, *labels, "held-out words")]
