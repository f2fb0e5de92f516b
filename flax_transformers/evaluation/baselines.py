"""What a model of text has to beat: guesses that need no model, on the same held-out tokens.

All are in nats per token over the very labels that ``eval/loss`` averages over, so the two compare.
A guess is fitted on what training asks for: the text itself, or, for encoder-decoders, the targets
that the objective makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.copying import copied, mixed_cross_entropy, mixture_weights
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.objectives.base import Batch, Vocabulary
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.objectives.masked_lm import Masking
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.sequences import SequenceLoss
from flax_transformers.training.config import TrainConfig

FITTED_ROWS, FITTED_LABELS = 20_000, 2_000_000
"""A guess is fitted on so many training rows or labels at most, whichever come first."""
FITTED_COPIES = 100
"""Batches of `_ROWS_AT_ONCE` that the weights of copying are fitted on at most."""
_BYTES_ORDER = 3
_ROWS_AT_ONCE = 64
_CALLED = {"bleu": "BLEU", "chrf": "chrF"}


@dataclass(frozen=True)
class Baseline:
    """A guess, and what it scores where the model scores ``metric``."""

    name: str
    metric: str
    """As in the metrics of a run, "eval/loss_de" for the part "de" of a mixture."""
    score: float
    count: int
    things: str
    """What it was scored on ``count`` of, such as "held-out tokens"."""
    unit: str = "nats"
    """What a loss is counted in; empty where it has no name."""
    part: str = ""
    """Of a mixture, that was scored by itself."""

    @property
    def is_loss(self) -> bool:
        """Whether less is better."""
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
        """The same as what one part of a mixture has to beat."""
        return replace(self, metric=f"{self.metric}_{part}", part=part)

    def line(self) -> str:
        """What there is to beat."""
        return f"{self._measured} {self._shown(self.score)} on {self.counted} ({self.name})"

    def verdict(self, score: float) -> str:
        """The model's ``score`` beside it, and by how much that is better or worse."""
        gain = self.score - score if self.is_loss else score - self.score
        return (
            f"held-out {self._measured} {self._shown(score)}, {self.name} "
            f"{self._shown(self.score)}: {self._shown(abs(gain))} "
            f"{'better' if gain >= 0 else 'worse'} on {self.counted}"
        )

    @property
    def _kind(self) -> str:
        """What is measured, without the part that it is measured on."""
        return self.metric.removeprefix("eval/").removesuffix(f"_{self.part}")

    @property
    def _measured(self) -> str:
        """The metric as people call it."""
        return _CALLED.get(self._kind, self._kind.replace("_", " "))

    def _shown(self, score: float) -> str:
        """A score in the unit of its metric."""
        if self.is_loss:
            return f"{score:.3f} {self.unit}".rstrip()
        shares = ("accuracy", "f1", "exact_match")
        return f"{100 * score:.1f}%" if self._kind.endswith(shares) else f"{score:.1f}"


def of_all_parts(found: Sequence[Baseline]) -> list[Baseline]:
    """What the whole of a mixture has to beat: the mean of what its parts have to, by their counts.

    Of ``found``, one for each part, only losses and accuracies have such a mean.
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


def text_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """The guesses that a run of ``config`` has to beat; none where nothing is held out.

    - "unigram": how common each piece is.
    - "trigram": for bytes, what follows the two before, as far as they stand in the same row; a
      mixture of the orders one to three (Witten-Bell: an order weighs more the more often its
      context was seen, and the less various what followed).
    - "copying": where a damaged text has to be restored, the tokens of the damaged one in turn,
      mixed with the former (see `copying`).
    - "chance": for next sentences.

    Sentinels count as one piece, "the next sentinel": anybody knows their order.
    """
    if not isinstance(config.objective, Masking | LMLoss):
        return []
    batches = list(held_out_batches(config, prepared, config.phases[-1].sequence_length))
    if not batches:
        return []
    order = _BYTES_ORDER if _has_contexts(config, prepared) else 1
    vocabulary = prepared.vocabulary.of_targets
    held_out = _all_grams(batches, vocabulary, order)
    count, things = len(held_out), "held-out tokens"
    training: list[Batch] = []
    if order == 1 and not isinstance(config.objective, SequenceLoss):
        counts = _text_counts(config, prepared)
        nats = _add_one(counts, held_out[:, 0])
    else:
        training = list(_training_batches(config, prepared))
        fitted = _all_grams(training, vocabulary, order)
        nats = ngram_cross_entropy(fitted, held_out, vocabulary.size)
    name = "trigram" if order > 1 else "unigram"
    found = [Baseline(f"{name} cross-entropy", "eval/loss", nats, count, things)]
    if isinstance(config.objective, Denoising):
        nats = _copying_cross_entropy(training, batches, vocabulary, order)
        found.append(Baseline("copying cross-entropy", "eval/loss", nats, count, things))
    if isinstance(config.objective, NextSentence):
        pairs = int(sum(batch["next_sentence_weights"].sum() for batch in batches))
        metric = "eval/next_sentence_accuracy"
        found.append(Baseline("chance", metric, 0.5, pairs, "held-out pairs"))
    return found


def _has_contexts(config: TrainConfig, prepared: PreparedText) -> bool:
    """Whether labels are bytes that follow one another."""
    tokenizer = prepared.target_tokenizer or prepared.tokenizer
    return tokenizer.kind == "bytes" and isinstance(config.objective, LMLoss)


def _text_counts(config: TrainConfig, prepared: PreparedText) -> np.ndarray:
    """How often each id is in the training text, int64 [size], ends of documents included where
    they are predicted."""
    counts = prepared.train.unigram_counts.copy()
    if not isinstance(config.objective, Masking):
        counts[prepared.vocabulary.end_id] += prepared.train.num_documents
    return counts


def _add_one(counts: np.ndarray, labels: np.ndarray) -> float:
    share = (counts + 1) / (counts.sum() + len(counts))
    return float(-np.log(share[labels]).mean())


def grams(batch: Batch, vocabulary: Vocabulary, order: int) -> np.ndarray:
    """Every label of a prepared batch behind the ``order - 1`` before it: int64 [n, order].

    What lies before the row, or before a segment of it, is -1.
    """
    found = []
    for labels, predicted in _batch_runs(batch):
        labels = sentinels_in_turn(labels, vocabulary)
        padded = np.concatenate([np.full(order - 1, -1, np.int64), labels])
        columns = [padded[first : first + len(labels)] for first in range(order)]
        found.append(np.stack(columns, axis=1)[predicted])
    return np.concatenate(found) if found else np.zeros((0, order), np.int64)


def _batch_runs(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`_label_runs` of all rows."""
    for row in range(len(batch["input_ids"])):
        yield from _label_runs({name: batch[name][row] for name in batch})


def _label_runs(row: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels that follow one another, and which of them are predicted, for each part of a row."""
    if "masked_labels" in row:
        predicted = row["masked_weights"] > 0
        yield row["masked_labels"][predicted], predicted[predicted]
        return
    weights = row["label_weights"] if "label_weights" in row else row["weights"]
    parts = row["segment_ids"] if "label_weights" in row else row.get("decoder_segment_ids")
    if parts is None:
        parts = (weights > 0).astype(np.int32)
    for part in range(1, int(parts.max(initial=0)) + 1):
        inside = parts == part
        yield row["labels"][inside], weights[inside] > 0


def sentinels_in_turn(labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """``labels`` with each sentinel that comes in its turn written as the first of them, int64."""
    labels = labels.astype(np.int64)
    place = 0
    for sentinel in vocabulary.sentinel_ids:
        found = np.flatnonzero(labels[place:] == sentinel)
        if not len(found):
            break
        place += int(found[0])
        labels[place] = vocabulary.sentinel_ids[0]
        place += 1
    return labels


def _all_grams(batches: Sequence[Batch], vocabulary: Vocabulary, order: int) -> np.ndarray:
    """`grams` of many batches."""
    return np.concatenate([grams(batch, vocabulary, order) for batch in batches])


def _training_batches(config: TrainConfig, prepared: PreparedText) -> Iterator[Batch]:
    """Rows to fit guesses on, prepared as for training."""
    length = config.phases[-1].sequence_length
    spec = config.objective.window_spec(length)
    examples = prepared.examples("train", spec)
    assert examples is not None  # a training split is always there
    stream = TrainStream(
        examples,
        config.objective,
        prepared.vocabulary,
        sequence_length=length,
        batch_size=_ROWS_AT_ONCE,
        seed=(config.seed, "baseline"),
    )
    rows, labels = min(FITTED_ROWS, len(examples)), 0
    with stream:
        while stream.position < rows and labels < FITTED_LABELS:
            batch = next(stream)
            labels += sum(int(predicted.sum()) for _, predicted in _batch_runs(batch))
            yield batch


def _copying_cross_entropy(
    training: Sequence[Batch], held_out: Sequence[Batch], vocabulary: Vocabulary, order: int
) -> float:
    """Nats per held-out label of copying the source, mixed with n-grams; see `copying`.

    The weights of the mixture are fitted on every second batch of training rows, with n-grams of
    the others.
    """
    mask_id = vocabulary.mask_id
    assert mask_id is not None  # as the objective puts it into every source

    def chances(
        batches: Sequence[Batch], counted: Sequence[Batch]
    ) -> tuple[np.ndarray, np.ndarray]:
        known, asked = (_all_grams(some, vocabulary, order) for some in (counted, batches))
        situations, right, share = map(
            np.concatenate, zip(*(copied(batch, mask_id) for batch in batches), strict=True)
        )
        common = ngram_chances(known, asked, vocabulary.size)
        return situations, np.stack([right, share, common], axis=1)

    half = training[1::2] or training  # of few rows, all
    weights = mixture_weights(*chances(half[:FITTED_COPIES], training[::2]))
    return mixed_cross_entropy(*chances(held_out, training), weights)


def ngram_cross_entropy(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Nats per row of ``held_out``: the mean of `ngram_chances`, as a cross-entropy."""
    return float(-np.log(ngram_chances(train, held_out, size)).mean())


def ngram_chances(train: np.ndarray, held_out: np.ndarray, size: int) -> np.ndarray:
    """Of each row of ``held_out`` int64 [m, order] its last column, given those before it.

    Gives float64 [m]. Fitted on ``train`` int64 [n, order]; ``size`` is how many different ids
    there are. Each order is mixed with the one below by Witten and Bell's weights (IEEE Trans. Inf.
    Theory 37(4), 1991), the lowest with an even guess.
    """
    chance = np.full(len(held_out), 1.0 / size)
    for order in range(1, train.shape[1] + 1):
        seen, counts = np.unique(_keys(train[:, -order:], size), return_counts=True)
        contexts, context_of = np.unique(seen // (size + 1), return_inverse=True)
        times = np.bincount(context_of, counts)  # how often a context was seen
        kinds = np.bincount(context_of)  # and how many different ids behind it
        asked = _keys(held_out[:, -order:], size)
        here = _looked_up(seen, counts, asked)
        context = asked // (size + 1)
        total, various = (_looked_up(contexts, values, context) for values in (times, kinds))
        known = total > 0
        mixed = (here + various * chance)[known] / (total + various)[known]
        chance[known] = mixed
    return chance


def _keys(columns: np.ndarray, size: int) -> np.ndarray:
    """One number for each row of ids from -1 to ``size - 1``: int64 [n]."""
    keys = np.zeros(len(columns), np.int64)
    for column in columns.T:
        keys = keys * (size + 1) + column + 1
    return keys


def _looked_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each of ``asked`` in a table of sorted ``keys``, 0 where it is not there."""
    places = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)
