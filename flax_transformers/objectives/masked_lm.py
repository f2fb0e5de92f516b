"""Masked language modelling (BERT, arXiv:1810.04805 §3.1): single tokens, whole words or spans."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.lm_loss import LOGITS_HELD
from flax_transformers.objectives.rows import frame, pad, random_ordinary
from flax_transformers.ranges import Ranges

SPAN_STOP = 0.2
SPAN_LONGEST = 10
"""SpanBERT (arXiv:1907.10529 §3.1): lengths are geometric, no longer than ten words, mean 3.8."""


@dataclass(frozen=True)
class Masking:
    """Which tokens of a row are predicted, and what stands in their place.

    Of the ordinary tokens of each row ``mask_fraction`` are chosen, an exact count. A chosen token
    becomes [MASK] with ``mask_share``, a random ordinary token with ``random_share``, else stays;
    tokens of a span share that fate. Special tokens and padding are never chosen.

    With ``choose="word"`` words are taken in random order. One that has more pieces than are still
    wanted is passed over for the next, as in BERT's own code, so that long words are chosen a
    little less often; only where none is short enough is the first of these cut to its first
    pieces. With ``"span"`` they come in runs (SpanBERT, arXiv:1907.10529 §3.1): a run begins at a
    random word, goes on from the last word of the row to the first, so that every place is as
    likely, and ends early where it meets another or the count.
    """

    mask_fraction: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    choose: Literal["token", "word", "span"] = "token"

    RANGES: ClassVar[Ranges] = {
        "mask_fraction": ranges.numbers(0, 1, above=True, below=True),
        "mask_share": ranges.SHARE,
        "random_share": ranges.SHARE,
        "static_epochs": ranges.integers(),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(
                f"objective.mask_share is {self.mask_share} and objective.random_share is "
                f"{self.random_share}; they must add up to at most 1"
            )

    def count(self, tokens: int) -> int:
        """How many of so many ordinary tokens are chosen."""
        return max(1, round(self.mask_fraction * tokens)) if tokens else 0

    def masked_row(
        self,
        row: np.ndarray,
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
        slots: int,
    ) -> dict[str, np.ndarray]:
        """``row`` int32 [n] with its choices made, in ``sequence_length`` T places.

        ``input_ids``, ``attention_mask`` int32 [T]; ``masked_positions``, ``masked_labels`` int32
        [M] and ``masked_weights`` float32 [M], 0 where M (``slots``) is not filled.
        """
        if vocab.mask_id is None:
            raise UserError(
                "the tokenizer has no [MASK], which masked language modelling needs; choose another"
            )
        row = row.copy()
        chosen, fate = self._choose(row, rng, vocab)
        labels = row[chosen]
        masked = fate < self.mask_share
        replaced = ~masked & (fate < self.mask_share + self.random_share)
        row[chosen[masked]] = vocab.mask_id
        row[chosen[replaced]] = random_ordinary(rng, int(replaced.sum()), vocab)
        return {
            "input_ids": pad(row, sequence_length, vocab.pad_id),
            "attention_mask": pad(np.ones(len(row), np.int32), sequence_length, 0),
            "masked_positions": pad(chosen, slots, 0),
            "masked_labels": pad(labels, slots, 0),
            "masked_weights": pad(np.ones(len(chosen), np.float32), slots, 0),
        }

    def _choose(
        self, row: np.ndarray, rng: np.random.Generator, vocab: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chosen positions, rising, and for each a number in [0, 1) that decides its fate."""
        ordinary = np.flatnonzero(~is_special(row, vocab))
        count = self.count(len(ordinary))
        if self.choose == "token":
            chosen = np.sort(rng.permutation(ordinary)[:count])
            return chosen, rng.random(count)
        edges = _word_edges(row, ordinary, vocab)
        words = len(edges) - 1
        runs = _single_words(rng, words) if self.choose == "word" else _spans(rng, words)
        pieces, run_of_piece = _whole_words(runs, edges.tolist(), count)
        order = np.argsort(pieces)
        chosen = ordinary[np.array(pieces, np.int64)[order]]
        if self.choose == "word":
            return chosen, rng.random(count)
        run = np.array(run_of_piece, np.int64)[order]
        return chosen, rng.random(max(run_of_piece, default=0) + 1)[run]

    def masked_terms(
        self, model: ModelFunctions, params: Params, hidden_BTD: Array, batch: Batch
    ) -> LossTerms:
        """Cross-entropy and accuracy at the chosen positions; only their logits are computed."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import word_scores

        positions_BM = batch["masked_positions"]
        chosen_BMD = jnp.take_along_axis(hidden_BTD, positions_BM[:, :, None], axis=1)
        words = model.unembedding(params, chosen_BMD)
        scores = word_scores(words, batch["masked_labels"], LOGITS_HELD)
        weights_BM = batch["masked_weights"]
        count = jnp.sum(weights_BM)
        loss = jnp.sum(scores.nll * weights_BM)
        return LossTerms(
            losses={"masked_lm": (loss, count, 1.0)},
            metrics={
                "loss": (loss, count),
                "accuracy": (jnp.sum(scores.correct * weights_BM), count),
            },
        )


@dataclass(frozen=True)
class MaskedLM(Masking):
    """Predict some tokens of a row of running text from all the others.

    RoBERTa's "full-sentences" (arXiv:1907.11692 §4.2) with ``cross_documents``, its "doc-sentences"
    without. ``Masking`` says how tokens are chosen.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("attention_mask",), causal=False)

    cross_documents: bool = True
    """Fill rows across document ends, with a separator there, or keep to one document a row."""
    static_epochs: int | None = None
    """Static masking: the same masks come round again after so many epochs (10 in RoBERTa §4.1).
    None: always new ones."""

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # [CLS] in front and [SEP] at the end take two places.
        return WindowSpec(
            sequence_length - 2, self.cross_documents, static_epochs=self.static_epochs
        )

    def predictions(self, sequence_length: int) -> int:
        """Chosen tokens in a full row: the width M of the arrays that hold them."""
        return self.count(sequence_length - 2)

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row; see ``Masking.masked_row`` for its arrays."""
        slots = self.predictions(sequence_length)
        return self.masked_row(frame(example, vocab), rng, vocab, sequence_length, slots)

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "masked_lm", and its plain cross-entropy and accuracy."""
        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        return self.masked_terms(model, params, hidden_BTD, batch)

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        return [shown_masks(row)]


def shown_masks(row: dict[str, np.ndarray]) -> ExampleView:
    """A row as ``Masking.masked_row`` makes it, for people to read."""
    labels = np.full(len(row["input_ids"]), -1, np.int32)
    real = row["masked_weights"] > 0
    labels[row["masked_positions"][real]] = row["masked_labels"][real]
    used = int(row["attention_mask"].sum())
    return ExampleView("row", row["input_ids"][:used], labels[:used])


def is_special(row: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """bool [n], True at special ids."""
    return _special(vocab.size, vocab.special_ids)[row]


@functools.lru_cache(maxsize=16)
def _special(size: int, special_ids: tuple[int, ...]) -> np.ndarray:
    special = np.zeros(size, bool)
    special[list(special_ids)] = True
    return special


def _word_edges(row: np.ndarray, ordinary: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Words as stretches of ``ordinary``: word w is ``ordinary[edges[w]:edges[w + 1]]``.

    A word begins where its piece says so, and behind a special token.
    """
    if vocab.word_start is None:
        raise UserError(
            "the tokenizer does not say which pieces begin a word, which whole words and spans "
            "need; set objective.choose to 'token' or choose another tokenizer"
        )
    begins = vocab.word_start[row[ordinary]]
    begins |= np.diff(ordinary, prepend=-1) > 1
    begins[:1] = True
    return np.append(np.flatnonzero(begins), len(ordinary))


def _single_words(rng: np.random.Generator, words: int) -> Iterator[list[int]]:
    """All words in random order, each a run of its own."""
    return ([word] for word in rng.permutation(words).tolist())


def _spans(rng: np.random.Generator, words: int) -> Iterator[list[int]]:
    """Runs of words on a circle that do not meet, until every word was in one."""
    lengths = span_lengths(rng, words).tolist()
    free = [True] * words
    for start, length in zip(rng.permutation(words).tolist(), lengths, strict=True):
        run = []
        for word in range(start, start + length):
            if not free[word % words]:
                break
            free[word % words] = False
            run.append(word % words)
        if run:
            yield run


def span_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """``count`` lengths from 1 to ten, ``P(n)`` in proportion to ``0.8 ** n``."""
    # The inverse of the distribution function of a geometric that is cut off, not heaped up, at 10.
    within = 1.0 - (1.0 - SPAN_STOP) ** SPAN_LONGEST
    lengths = np.log1p(-rng.random(count) * within) / np.log1p(-SPAN_STOP)
    return np.clip(np.ceil(lengths), 1, SPAN_LONGEST).astype(np.int64)


def _whole_words(
    runs: Iterator[list[int]], edges: list[int], count: int
) -> tuple[list[int], list[int]]:
    """The first ``count`` pieces of the words of ``runs``, and the number of the run of each.

    A word that is too long ends its run; if nothing else fills the count, it is cut.
    """
    pieces: list[int] = []
    run_of_piece: list[int] = []
    too_long: int | None = None
    number = 0
    for number, run in enumerate(runs):
        for word in run:
            left = count - len(pieces)
            size = edges[word + 1] - edges[word]
            if size > left:
                too_long = word if too_long is None else too_long
                break
            pieces.extend(range(edges[word], edges[word + 1]))
            run_of_piece.extend([number] * size)
        if len(pieces) == count:
            return pieces, run_of_piece
    if too_long is not None:
        left = count - len(pieces)
        pieces.extend(range(edges[too_long], edges[too_long] + left))
        run_of_piece.extend([number + 1] * left)
    return pieces, run_of_piece
