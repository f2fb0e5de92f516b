"""n-gram baselines of text: a byte trigram, and for BART copying of the damaged source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.baselines.copying import copied, mixed_cross_entropy, mixture_weights
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import (
    Baseline,
    baseline_batches,
    label_runs,
    sentinels_in_turn,
)
from flax_transformers.evaluation.held_out import held_out_batches
from flax_transformers.objectives.base import Batch, Vocabulary
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.lm_loss import LMLoss
from flax_transformers.training.config import TrainConfig

MAX_COPIED = 100
"""Largest number of batches that the weights of copying are fitted on."""
_BYTES_ORDER = 3


def text_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """Cross-entropies in nats per held-out label of language-modelling objectives.

    - "trigram", for bytes: the byte after the two before it in the same row, an interpolation of
      the orders one to three.
    - "copying", where a damaged text is restored: the tokens of the damaged text in turn, mixed
      with n-grams (see `copying`).
    """
    tokenizer = prepared.target_tokenizer or prepared.tokenizer
    order = _BYTES_ORDER if tokenizer.kind == "bytes" else 1
    copies = isinstance(config.objective, Denoising)
    if not isinstance(config.objective, LMLoss) or not (order > 1 or copies):
        return []
    batches = list(held_out_batches(config, prepared, config.phases[-1].sequence_length))
    if not batches:
        return []
    vocabulary, training = prepared.vocabulary.of_targets, list(baseline_batches(config, prepared))
    held_out = all_grams(batches, vocabulary, order)
    scores = {}
    if order > 1:
        fitted = all_grams(training, vocabulary, order)
        scores["trigram"] = ngram_cross_entropy(fitted, held_out, vocabulary.size)
    if copies:
        scores["copying"] = _copying_cross_entropy(training, batches, vocabulary, order)
    counted = len(held_out), "held-out tokens"
    return [
        Baseline(f"{name} cross-entropy", "eval/loss", nats, *counted)
        for name, nats in scores.items()
    ]


def grams(batch: Batch, vocabulary: Vocabulary, order: int) -> np.ndarray:
    """Every label of a prepared batch after the ``order - 1`` labels before it: int64 [n, order].

    Labels before the row, or before a segment of it, are -1.
    """
    found = []
    rows = ({name: batch[name][row] for name in batch} for row in range(len(batch["input_ids"])))
    for labels, predicted in (run for row in rows for run in label_runs(row)):
        labels = sentinels_in_turn(labels, vocabulary)
        padded = np.concatenate([np.full(order - 1, -1, np.int64), labels])
        columns = [padded[first : first + len(labels)] for first in range(order)]
        found.append(np.stack(columns, axis=1)[predicted])
    return np.concatenate(found) if found else np.zeros((0, order), np.int64)


def all_grams(batches: Sequence[Batch], vocabulary: Vocabulary, order: int) -> np.ndarray:
    """`grams` of many batches."""
    return np.concatenate([grams(batch, vocabulary, order) for batch in batches])


def _copying_cross_entropy(
    training: Sequence[Batch], held_out: Sequence[Batch], vocabulary: Vocabulary, order: int
) -> float:
    """Nats per held-out label of copying the source, mixed with n-grams; see `copying`.

    The weights of the mixture are fitted on every second batch of training rows, with n-grams of
    the other batches.
    """
    mask_id = vocabulary.mask_id
    assert mask_id is not None  # the objective puts it into every source

    def chances(
        batches: Sequence[Batch], counted: Sequence[Batch]
    ) -> tuple[np.ndarray, np.ndarray]:
        known, asked = (all_grams(some, vocabulary, order) for some in (counted, batches))
        situations, right, share = map(
            np.concatenate, zip(*(copied(batch, mask_id) for batch in batches), strict=True)
        )
        common = ngram_chances(known, asked, vocabulary.size)
        return situations, np.stack([right, share, common], axis=1)

    half = training[1::2] or training
    weights = mixture_weights(*chances(half[:MAX_COPIED], training[::2]))
    return mixed_cross_entropy(*chances(held_out, training), weights)


def ngram_cross_entropy(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Nats per row of ``held_out``: the mean of `ngram_chances`, as a cross-entropy."""
    return float(-np.log(ngram_chances(train, held_out, size)).mean())


def ngram_chances(train: np.ndarray, held_out: np.ndarray, size: int) -> np.ndarray:
    """Probability of the last column of each row of ``held_out`` int64 [m, order], given the
    columns before it: float64 [m].

    Fitted on ``train`` int64 [n, order] over ``size`` ids. Each order is interpolated with the next
    lower one by Witten and Bell's weights (IEEE Trans. Inf. Theory 37(4), 1991), the lowest with
    the uniform distribution.
    """
    chance = np.full(len(held_out), 1.0 / size)
    for order in range(1, train.shape[1] + 1):
        seen, counts = np.unique(_keys(train[:, -order:], size), return_counts=True)
        contexts, context_of = np.unique(seen // (size + 1), return_inverse=True)
        times = np.bincount(context_of, counts)  # occurrences of a context
        kinds = np.bincount(context_of)  # different ids after it
        asked = _keys(held_out[:, -order:], size)
        here = _looked_up(seen, counts, asked)
        context = asked // (size + 1)
        total, various = (_looked_up(contexts, values, context) for values in (times, kinds))
        known = total > 0
        mixed = (here + various * chance)[known] / (total + various)[known]
        chance[known] = mixed
    return chance


def _keys(columns: np.ndarray, size: int) -> np.ndarray:
    """One integer for each row of ids from -1 to ``size - 1``: int64 [n]."""
    keys = np.zeros(len(columns), np.int64)
    for column in columns.T:
        keys = keys * (size + 1) + column + 1
    return keys


def _looked_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each of ``asked`` in a table of sorted ``keys``, 0 for missing keys."""
    indices = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[indices] == asked, values[indices], 0)
