"""What an objective is, as the rooms around it see it.

An objective has two halves. ``prepare`` runs on the host, in numpy, one example at a time, and
gives arrays of fixed shape. ``terms`` runs in jax, one batch at a time, and gives sums and weights.
The data pipeline knows only the first half, the training step only the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Array = Any  # jax.Array or numpy array; jax is not imported here, data workers read this file
Params = Mapping[str, Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True)
class Vocabulary:
    """All that an objective knows of a tokenizer: its size and its special ids.

    ``word_start[i]`` is True where piece ``i`` begins a word (bool, shape [size]).
    An id is None where the tokenizer has no such token.
    """

    size: int
    pad_id: int
    unk_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    mask_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    special_ids: tuple[int, ...] = ()
    word_start: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class WindowSpec:
    """What an objective asks of the window index over a token store.

    ``length``: at most this many raw tokens; a document end inside the window counts as one more,
    for the separator that ``prepare`` puts there.
    ``cross_documents``: windows run on over document ends (RoBERTa's "full-sentences",
    arXiv:1907.11692 §4.2) or stop at them ("doc-sentences").
    """

    length: int
    cross_documents: bool


@dataclass(frozen=True)
class ModelFunctions:
    """The two halves of a model, as pure functions of parameters.

    ``hidden_states(params, batch, rngs) -> [B, T, D]``; dropout is on when ``rngs`` has "dropout".
    ``unembed(params, hidden) -> [..., V]`` logits in float32, V the padded vocabulary, padded
    entries at a large negative value.
    """

    hidden_states: Callable[[Params, Batch, Mapping[str, Array]], Array]
    unembed: Callable[[Params, Array], Array]


@dataclass(frozen=True)
class Terms:
    """What a batch contributes to the loss and to the metrics, as sums.

    ``losses[name] = (sum, weight, coefficient)``: the trained loss is the sum over names of
    ``coefficient * total(sum) / total(weight)``, totals running over the whole global batch. A
    weight depends on the data alone, never on parameters or random numbers.
    ``metrics[name] = (sum, count)``: reported as total over total, not trained.
    """

    losses: dict[str, tuple[Array, Array, float]]
    metrics: dict[str, tuple[Array, Array]]


class Objective(Protocol):
    """A frozen dataclass of settings with these four methods."""

    def window_spec(self, sequence_length: int) -> WindowSpec:
        """Which windows of text to cut for rows of ``sequence_length`` tokens."""

    def predictions(self, sequence_length: int) -> int:
        """At most how many places of a row get logits."""

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One training row of fixed shapes from one raw example.

        Text arrives as ``tokens`` int32 [n] and ``document_ends`` int32 [k], positions in (0, n]
        after which a document ends.
        """

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Terms:
        """Sums and weights of one (micro-)batch."""
