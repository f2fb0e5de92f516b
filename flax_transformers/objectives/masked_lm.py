"""Masked language modelling of tokens, whole words or spans (BERT, arXiv:1810.04805)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    ExampleView,
    Frame,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.lm_loss import MAX_LOGITS
from flax_transformers.objectives.rows import (
    bert_frame,
    frame,
    pad,
    padded_tokens,
    random_ordinary,
)

SPAN_STOP = 0.2
SPAN_LONGEST = 10
"""SpanBERT (arXiv:1907.10529 section 3.1): geometric lengths of at most ten words, mean 3.8."""


@dataclass(frozen=True)
class Masking:
    """Selection of the tokens that are predicted, and what replaces them.

    A selected token becomes [MASK] with probability ``mask_share``, a random ordinary token with
    ``random_share``, and else is kept; tokens of one span are treated alike. Special tokens and
    padding are never selected.

    With ``choose="word"``, words are selected in random order. A word with more tokens than are
    still needed is skipped, as in BERT's own code, so that long words are selected slightly less
    often; if no word is short enough, the first of these is cut. With ``"span"``, words are
    selected in runs (SpanBERT, arXiv:1907.10529 section 3.1): a run begins at a random word,
    continues at the first word after the last, so that all words are equally likely, and ends early
    at another run or when the count is reached.
    """

    mask_fraction: float = 0.15
    """Share of the ordinary tokens of each sequence that is selected, an exact count."""
    mask_share: float = 0.8
    """Share of the selected tokens that become [MASK]."""
    random_share: float = 0.1
    """Share of the selected tokens that become a random token."""
    choose: Literal["token", "word", "span"] = "token"
    """What is selected together."""
    static_epochs: int | None = field(default=None, kw_only=True)
    """Static masking: number of epochs after which examples and their masks repeat (10 in RoBERTa,
    arXiv:1907.11692 section 4.1). None: new ones in every epoch."""

    RANGES: ClassVar[ranges.Ranges] = {
        "mask_fraction": ranges.numbers(0, 1, above=True, below=True),
        "mask_share": ranges.SHARE,
        "random_share": ranges.SHARE,
        "static_epochs": ranges.integers(),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")
        if self.mask_share + self.random_share > 1.0:
            raise ranges.OutOfRange(
                f"objective.mask_share is {self.mask_share} and objective.random_share is "
                f"{self.random_share}; they must add up to at most 1"
            )

    def count(self, tokens: int) -> int:
        """Number of tokens selected out of ``tokens`` ordinary ones."""
        return max(1, round(self.mask_fraction * tokens)) if tokens else 0

    def frame(self, vocab: Vocabulary) -> Frame:
        """Special tokens around a text, or two."""
        return bert_frame(vocab)

    def mask(
        self,
        ids: np.ndarray,
        rng: Rng,
        vocab: Vocabulary,
        sequence_length: int,
        predictions: int,
    ) -> Arrays:
        """A prepared example of T = ``sequence_length`` positions from ``ids`` int32 [n].

        ``input_ids`` and ``attention_mask`` int32 [T]; ``masked_positions`` and ``masked_labels``
        int32 [M] and ``masked_weights`` float32 [M], 0 beyond the selected tokens, where M is
        ``predictions``.
        """
        if vocab.mask_id is None:
            raise UserError(
                "the tokenizer has no [MASK], which masked language modelling needs; choose another"
            )
        ids = ids.copy()
        chosen, draw = self._choose(ids, rng, vocab)
        labels = ids[chosen]
        masked = draw < self.mask_share
        replaced = ~masked & (draw < self.mask_share + self.random_share)
        ids[chosen[masked]] = vocab.mask_id
        ids[chosen[replaced]] = random_ordinary(rng, int(replaced.sum()), vocab)
        return padded_tokens(ids, sequence_length, vocab) | {
            "masked_positions": pad(chosen, predictions, 0),
            "masked_labels": pad(labels, predictions, 0),
            "masked_weights": pad(np.ones(len(chosen), np.float32), predictions, 0),
        }

    def _choose(
        self, ids: np.ndarray, rng: Rng, vocab: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray]:
        """Selected positions in increasing order, and for each a random number in [0, 1)."""
        ordinary = np.flatnonzero(~is_special(ids, vocab))
        count = self.count(len(ordinary))
        if self.choose == "token":
            chosen = np.sort(rng.permutation(ordinary)[:count])
            return chosen, rng.random(count)
        edges = _word_edges(ids, ordinary, vocab)
        words = len(edges) - 1
        runs = _single_words(rng, words) if self.choose == "word" else _spans(rng, words)
        tokens, run_of_token = _whole_words(runs, edges.tolist(), count)
        order = np.argsort(tokens)
        chosen = ordinary[np.array(tokens, np.int64)[order]]
        if self.choose == "word":
            return chosen, rng.random(count)
        run = np.array(run_of_token, np.int64)[order]
        return chosen, rng.random(max(run_of_token, default=0) + 1)[run]

    def masked_terms(
        self, model: ModelFunctions, params: Params, hidden_BTD: Array, batch: Batch
    ) -> LossTerms:
        """Cross-entropy and accuracy at the selected positions; only their logits are computed."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        from flax_transformers.objectives.cross_entropy import label_terms, lm_scores

        positions_BM = batch["masked_positions"]
        chosen_BMD = jnp.take_along_axis(hidden_BTD, positions_BM[:, :, None], axis=1)
        unembedding = model.unembedding(params, chosen_BMD)
        scores = lm_scores(unembedding, batch["masked_labels"], MAX_LOGITS)
        return label_terms("masked_lm", scores, batch["masked_weights"])


@dataclass(frozen=True)
class MaskedLM(Masking):
    """Predict masked tokens of running text from all others.

    RoBERTa's "full-sentences" (arXiv:1907.11692 section 4.2) with ``cross_documents``, its
    "doc-sentences" without. See `Masking` for the selection of tokens.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("unembed",), ("attention_mask",), causal=False)

    cross_documents: bool = True
    """Fill sequences across document ends, with a separator there; else one document each."""

    def window_spec(self, sequence_length: int) -> WindowSpec:
        # [CLS] and [SEP] take two positions.
        return WindowSpec(
            sequence_length - 2,
            self.cross_documents,
            static_epochs=self.static_epochs,
            sentence_ends=False,
        )

    def predictions(self, sequence_length: int) -> int:
        """Number of selected tokens of a full sequence: the size M of their arrays."""
        return self.count(sequence_length - 2)

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare one example; see `Masking.mask` for its arrays."""
        predictions = self.predictions(sequence_length)
        return self.mask(frame(example, vocab), rng, vocab, sequence_length, predictions)

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "masked_lm"; the metrics "loss" and "accuracy"."""
        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        return self.masked_terms(model, params, hidden_BTD, batch)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        return [masked_view(row)]


def masked_view(row: Arrays) -> ExampleView:
    """Readable form of an example of `Masking.mask`."""
    labels = np.full(len(row["input_ids"]), -1, np.int32)
    real = row["masked_weights"] > 0
    labels[row["masked_positions"][real]] = row["masked_labels"][real]
    used = int(row["attention_mask"].sum())
    return ExampleView("row", row["input_ids"][:used], labels[:used])


def is_special(ids: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Whether each id is special: bool [n]."""
    return _special(vocab.size, vocab.special_ids)[ids]


@functools.lru_cache(maxsize=16)
def _special(size: int, special_ids: tuple[int, ...]) -> np.ndarray:
    special = np.zeros(size, bool)
    special[list(special_ids)] = True
    return special


def _word_edges(ids: np.ndarray, ordinary: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Edges of words among ``ordinary``: word w is ``ordinary[edges[w]:edges[w + 1]]``.

    A word begins at a token that begins a word, and after a special token.
    """
    if vocab.word_start is None:
        raise UserError(
            "the tokenizer does not define which tokens begin a word, which masking of whole words "
            "and spans needs; set objective.choose to 'token' or choose another tokenizer"
        )
    begins = vocab.word_start[ids[ordinary]]
    begins |= np.diff(ordinary, prepend=-1) > 1
    begins[:1] = True
    return np.append(np.flatnonzero(begins), len(ordinary))


def _single_words(rng: Rng, words: int) -> Iterator[list[int]]:
    """All words in random order, each as its own run."""
    return ([word] for word in rng.permutation(words).tolist())


def _spans(rng: Rng, words: int) -> Iterator[list[int]]:
    """Disjoint runs of all words; a run continues from the last word to the first."""
    lengths = geometric_span_lengths(rng, words).tolist()
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


def geometric_span_lengths(rng: Rng, count: int) -> np.ndarray:
    """``count`` lengths from 1 to 10, with ``P(n)`` proportional to ``0.8 ** n``."""
    # Inverse of the distribution function of a truncated (not clipped) geometric distribution.
    within = 1.0 - (1.0 - SPAN_STOP) ** SPAN_LONGEST
    lengths = np.log1p(-rng.random(count) * within) / np.log1p(-SPAN_STOP)
    return np.clip(np.ceil(lengths), 1, SPAN_LONGEST).astype(np.int64)


def _whole_words(
    runs: Iterator[list[int]], edges: list[int], count: int
) -> tuple[list[int], list[int]]:
    """The first ``count`` tokens of the words of ``runs``, and the number of the run of each.

    A word that is too long ends its run; the first such word is cut if no other fills the count.
    """
    tokens: list[int] = []
    run_of_token: list[int] = []
    too_long: int | None = None
    number = 0
    for number, run in enumerate(runs):
        for word in run:
            left = count - len(tokens)
            size = edges[word + 1] - edges[word]
            if size > left:
                too_long = word if too_long is None else too_long
                break
            tokens.extend(range(edges[word], edges[word + 1]))
            run_of_token.extend([number] * size)
        if len(tokens) == count:
            return tokens, run_of_token
    if too_long is not None:
        left = count - len(tokens)
        tokens.extend(range(edges[too_long], edges[too_long] + left))
        run_of_token.extend([number + 1] * left)
    return tokens, run_of_token
