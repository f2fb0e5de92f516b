"""Baselines: guesses that need no model, scored on the same held-out examples as the model.

The trainer knows unigram frequencies, the majority class, and means. `benchmarks/baselines` has
stronger ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.held_out import evenly_spread, held_out_batches
from flax_transformers.objectives.base import Batch, Vocabulary
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.training.config import TrainConfig

FITTED_ROWS, FITTED_LABELS = 20_000, 2_000_000
"""Largest number of training rows and labels that a baseline is fitted on; the first limit that is
reached ends the fit."""
_BATCH_ROWS = 64
_DISPLAY_NAMES = {
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
}  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """The score of a baseline, where the model's score is ``metric``."""

    name: str
    metric: str
    """As in the metrics of a run, "eval/loss_de" for the component "de" of a mixture, and
    "eval/de/loss" for the evaluation set "de"."""
    score: float
    count: int
    things: str
    """What ``count`` counts, such as "held-out tokens"."""
    unit: str = "nats"
    """Unit of a loss; empty if it has none."""
    part: str = ""
    """Name of the component of a mixture, or of the evaluation set; empty for the whole data."""

    @property
    def is_loss(self) -> bool:
        """Whether lower is better."""
        return self._kind == "loss"

    @property
    def counted(self) -> str:
        """What it was scored on, such as "5,120 held-out tokens of de"."""
        return f"{self.count:,} {self.things}" + (f" of {self.part}" if self.part else "")

    @property
    def key(self) -> str:
        """Its name in the output of ``evaluate``, such as "unigram_cross_entropy"."""
        measured = [] if self.is_loss else [self._kind]
        part = [self.part] if self.part else []
        return "_".join([*self.name.replace("-", " ").split(), *measured, *part])

    def of_part(self, part: str) -> Baseline:
        """The same baseline, as that of one component of a mixture."""
        return replace(self, metric=f"{self.metric}_{part}", part=part)

    def of_set(self, name: str) -> Baseline:
        """The same baseline, as that of an evaluation set."""
        return replace(self, metric=of_set(self.metric, name), part=name)

    def line(self) -> str:
        """One line for the start of a run."""
        return f"{self.measured} {self._shown(self.score)} on {self.counted} ({self.name})"

    def verdict(self, score: float) -> str:
        """One line that compares the model's ``score`` with the baseline."""
        gain = self.score - score if self.is_loss else score - self.score
        # A difference of two percentages is in points: "68% better" would be a ratio.
        distance = self._shown(abs(gain)).replace("%", " points")
        return (
            f"held-out {self.measured} {self._shown(score)}, {self.name} "
            f"{self._shown(self.score)}: {distance} "
            f"{'better' if gain >= 0 else 'worse'} on {self.counted}"
        )

    @property
    def _kind(self) -> str:
        """The metric without "eval/" and the name of the component or the set."""
        kind = self.metric.removeprefix("eval/").removesuffix(f"_{self.part}")
        return kind.removeprefix(f"{self.part}/")

    @property
    def measured(self) -> str:
        """The metric's display name."""
        return _DISPLAY_NAMES.get(self._kind, self._kind.replace("_", " "))

    def _shown(self, score: float) -> str:
        """A score in the unit of its metric."""
        if self.is_loss:
            return f"{score:.3f} {self.unit}".rstrip()
        shares = ("accuracy", "f1", "exact_match")
        return f"{100 * score:.1f}%" if self._kind.endswith(shares) else f"{score:.1f}"


def of_set(metric: str, name: str) -> str:
    """The name of a metric of an evaluation set: "eval/NAME/loss" for "eval/loss"."""
    return f"eval/{name}/{metric.removeprefix('eval/')}"


def of_all_parts(found: Sequence[Baseline]) -> list[Baseline]:
    """Baselines of a whole mixture: the mean over its components, weighted by their counts.

    ``found`` holds the baselines of the components. Only losses and accuracies have such a mean.
    """
    alike: dict[tuple[str, str], list[Baseline]] = {}
    for one in found:
        kind = one.metric.removesuffix(f"_{one.part}")
        if one.is_loss or kind.endswith("accuracy"):
            alike.setdefault((one.name, kind), []).append(one)
    return [
        replace(
            some[0],
            metric=kind,
            score=sum(one.score * one.count for one in some) / sum(one.count for one in some),
            count=sum(one.count for one in some),
            part="",
        )
        for (_, kind), some in alike.items()
    ]


def masked_token_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The unigram cross-entropy of masked tokens, fitted on the training text."""
    return _unigram(_held_out(config, prepared), prepared, prepared.train.unigram_counts)


def next_sentence_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """As `masked_token_baselines`, and chance for the second sentence, which half of the pairs
    have from another document, or before the first."""
    batches = list(_held_out(config, prepared))
    found = _unigram(batches, prepared, prepared.train.unigram_counts)
    if found:
        pairs = sum(int(batch["next_sentence_weights"].sum()) for batch in batches)
        assert isinstance(config.objective, NextSentence)
        metric = f"eval/{config.objective.task}_accuracy"
        found.append(Baseline("chance", metric, 0.5, pairs, "held-out pairs"))
    return found


def next_token_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The unigram cross-entropy of tokens and document ends, fitted on the training text."""
    counts = prepared.train.unigram_counts.copy()
    counts[prepared.vocabulary.end_id] += prepared.train.num_documents
    return _unigram(_held_out(config, prepared), prepared, counts)


def target_token_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The unigram cross-entropy of a decoder's targets, fitted on those of training rows."""
    vocabulary = prepared.vocabulary.of_targets
    counts = np.zeros(vocabulary.size, np.int64)
    for batch in baseline_batches(config, prepared):
        counts += np.bincount(predicted_labels(batch, vocabulary), minlength=vocabulary.size)
    return _unigram(_held_out(config, prepared), prepared, counts)


def _unigram(
    batches: Iterable[Batch], prepared: PreparedText, counts: np.ndarray
) -> list[Baseline]:
    """Nats per held-out label under add-one smoothed ``counts`` int64 [size]; none without labels.

    The labels are those that ``eval/loss`` averages over.
    """
    vocabulary = prepared.vocabulary.of_targets
    found, counted = [], "held-out tokens"
    for batch in batches:
        found.append(predicted_labels(batch, vocabulary))
        if "masked_weights" in batch:
            counted = "masked held-out tokens"
    if not found:
        return []
    labels = np.concatenate(found)
    share = (counts + 1) / (counts.sum() + len(counts))
    nats = float(-np.log(share[labels]).mean())
    return [Baseline("unigram cross-entropy", "eval/loss", nats, len(labels), counted)]


def _held_out(config: TrainConfig, prepared: PreparedText) -> Iterator[Batch]:
    return held_out_batches(config, prepared, config.phases[-1].sequence_length)


def predicted_labels(batch: Batch, vocabulary: Vocabulary) -> np.ndarray:
    """The labels of a prepared batch that have a weight, int64 [n].

    Sentinels count as one entry, "the next sentinel", because their order is fixed.
    """
    return np.concatenate(
        [
            sentinels_in_turn(labels, vocabulary)[weighted]
            for row in range(len(batch["input_ids"]))
            for labels, weighted in label_runs({name: batch[name][row] for name in batch})
        ]
        or [np.zeros(0, np.int64)]
    )


def label_runs(row: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive labels and a mask of those with a weight, for each segment of one row."""
    if "masked_labels" in row:
        weighted = row["masked_weights"] > 0
        yield row["masked_labels"][weighted], weighted[weighted]
        return
    weights = row["label_weights"] if "label_weights" in row else row["weights"]
    segments = row["segment_ids"] if "label_weights" in row else row.get("decoder_segment_ids")
    if segments is None:
        segments = (weights > 0).astype(np.int32)
    for segment in range(1, int(segments.max(initial=0)) + 1):
        inside = segments == segment
        yield row["labels"][inside], weights[inside] > 0


def sentinels_in_turn(labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """``labels`` with every sentinel that is in the expected order replaced by the first sentinel,
    int64."""
    labels = labels.astype(np.int64)
    position = 0
    for sentinel in vocabulary.sentinel_ids:
        found = np.flatnonzero(labels[position:] == sentinel)
        if not len(found):
            break
        position += int(found[0])
        labels[position] = vocabulary.sentinel_ids[0]
        position += 1
    return labels


def baseline_batches(config: TrainConfig, prepared: PreparedText) -> Iterator[Batch]:
    """Training rows to fit a baseline on, prepared as for training."""
    length = config.phases[-1].sequence_length
    examples = prepared.examples("train", config.objective.window_spec(length))
    assert examples is not None  # every dataset has a training split
    stream = TrainStream(
        examples,
        config.objective,
        prepared.vocabulary,
        sequence_length=length,
        batch_size=_BATCH_ROWS,
        seed=(config.seed, "baseline"),
    )
    rows, labels = min(FITTED_ROWS, len(examples)), 0
    with stream:
        while stream.position < rows and labels < FITTED_LABELS:
            batch = next(stream)
            labels += len(predicted_labels(batch, prepared.vocabulary.of_targets))
            yield batch


def majority_class(
    config: TrainConfig, train: np.ndarray, held_out: np.ndarray, things: str
) -> Baseline:
    """Accuracy of the most frequent class of ``train`` int [n] on the ``held_out`` labels int [m]
    that are scored."""
    scored = held_out[evenly_spread(len(held_out), config.evaluation.max_examples)]
    score = float(np.mean(scored == np.bincount(train).argmax()))
    return Baseline("majority class", "eval/accuracy", score, len(scored), things)
