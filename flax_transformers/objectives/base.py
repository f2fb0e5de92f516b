"""What an objective is, as the rooms around it see it.

An objective has two halves. ``prepare`` runs on the host, in numpy, one example at a time, and
gives arrays of fixed shape. ``terms`` runs in jax, one batch at a time, and gives sums and weights.
The data pipeline knows only the first half, the training step only the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

Array = Any  # jax.Array or numpy array; jax is not imported here, data workers read this file
Params = Mapping[str, Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True)
class Frame:
    """Special tokens around one text: ``before`` it and ``after`` it."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """All that an objective knows of a tokenizer: its size and its special ids.

    ``word_start[i]`` is True where token ``i`` begins a word (bool, shape [size]).
    A role's id is None where the tokenizer has no such token. ``sentinel_ids`` are those that stand
    for missing spans, in the order of use (T5's ``<extra_id_0>``, ``<extra_id_1>`` ...).
    ``pad_id`` fills rows up. Where the tokenizer has no padding token (GPT-2, Llama, Mistral),
    ``has_pad`` is False and ``pad_id`` is another id, which masks alone tell from text.
    ``frame``: what the tokenizer's own files put around one text; None for a tokenizer trained
    here, whose texts are framed as the objective says.
    ``target``, where the targets of pairs have a tokenizer of their own, is what to know of that.
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
    sentinel_ids: tuple[int, ...] = ()
    word_start: np.ndarray | None = field(default=None, compare=False, repr=False)
    target: Vocabulary | None = None
    has_pad: bool = True
    frame: Frame | None = None

    @property
    def end_id(self) -> int | None:
        """What ends a text: </s> or the like, [SEP] in a tokenizer without it, or nothing."""
        return self.sep_id if self.eos_id is None else self.eos_id

    @property
    def of_targets(self) -> Vocabulary:
        """That of what has to be written: their own, or the one for all text."""
        return self if self.target is None else self.target

    @property
    def roles(self) -> dict[str, int]:
        """The ids of the roles that the tokenizer has a token for: "pad", "unk", "cls" ..."""
        names = ("unk", "cls", "sep", "mask", "bos", "eos")
        found = {name: getattr(self, f"{name}_id") for name in names}
        found |= {"pad": self.pad_id if self.has_pad else None}
        return {name: i for name, i in found.items() if i is not None}

    def within(self, rows: int, pad_id: int = -1) -> Vocabulary:
        """The part of it that a model with ``rows`` token embeddings knows.

        A role beyond them is left out. Padding that the tokenizer does not have, or that is beyond
        them, becomes the model's ``pad_id``, or without one (-1) a special token's.
        """
        lost: dict[str, Any] = {
            f"{name}_id": None for name, i in self.roles.items() if i >= rows and name != "pad"
        }
        kept = replace(self, **lost) if lost else self
        fill, has_pad = self.pad_id, self.has_pad and self.pad_id < rows
        if not has_pad:
            spare = (pad_id if pad_id >= 0 else None, kept.end_id, kept.bos_id, kept.unk_id, 0)
            fill = next(i for i in spare if i is not None)
        return replace(
            kept,
            size=min(self.size, rows),
            pad_id=fill,
            has_pad=has_pad,
            special_ids=tuple(i for i in self.special_ids if i < rows),
            sentinel_ids=tuple(i for i in self.sentinel_ids if i < rows),
            word_start=None if self.word_start is None else self.word_start[:rows],
        )


@dataclass(frozen=True)
class WindowSpec:
    """What an objective asks of the window index over a token store.

    ``length``: at most this many raw tokens; a document end inside the window counts as one more,
    for the separator that ``prepare`` puts there.
    ``cross_documents``: windows run on over document ends (RoBERTa's "full-sentences",
    arXiv:1907.11692 §4.2) or stop at them ("doc-sentences").
    ``sentences``: at most this many sentences; None: as many as fit.
    ``whole_sentences``: windows end where sentences do, and may be shorter for it; or they are
    filled, wherever that cuts.
    ``other``: with each window comes a second one, drawn anew from another document.
    ``static_epochs``: the random choices of ``prepare`` come round again after this many epochs
    (static masking, RoBERTa §4.1); None: they never do.
    """

    length: int
    cross_documents: bool
    sentences: int | None = None
    whole_sentences: bool = True
    other: bool = False
    static_epochs: int | None = None


@dataclass(frozen=True)
class ModelFunctions:
    """The halves of a model, as pure functions of parameters.

    ``hidden_states(params, batch, rngs)`` has ``last_hidden_state`` [B, T, D] and ``auxiliary``:
    None, or what layers add up for a loss of their own, whose ``by_sequence()`` gives its sum and
    weight (the balance of experts). Dropout is on when ``rngs`` has "dropout".
    ``unembedding(params, hidden)`` is what hidden states [B, M, D] say of the words, before any
    logit is made: the record ``models.heads.Unembedding``, whose ``logits()`` makes them all.
    ``head(name, params, rngs, *arrays)`` is the model's method ``name`` ("next_sentence",
    "classify"), for models that have it.
    """

    hidden_states: Callable[[Params, Batch, Mapping[str, Array]], Any]
    unembedding: Callable[[Params, Array], Any]
    head: Callable[..., Array]


@dataclass(frozen=True)
class LossTerms:
    """What a batch contributes to the loss and to the metrics, as sums.

    ``losses[name] = (sum, weight, coefficient)``: the trained loss is the sum over names of
    ``coefficient * total(sum) / total(weight)``, totals running over the whole global batch. A
    weight depends on the data alone, never on parameters or random numbers.
    ``metrics[name] = (sum, count)``: reported as total over total, not trained.
    """

    losses: dict[str, tuple[Array, Array, float]]
    metrics: dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class ModelNeeds:
    """What an objective cannot do without in a model.

    ``heads``: methods, such as "unembed". ``inputs``: names that its hidden states have to take.
    ``causal``: it must see only what came before (True), both ways (False), or either (None).
    """

    heads: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    causal: bool | None = None


@dataclass(frozen=True)
class ExampleView:
    """One sequence of a prepared row, as people read it; padding is left out.

    ``ids`` int32 [n]: what stands there. ``labels`` int32 [n]: what has to be predicted at each
    place, -1 where nothing has. ``segments`` int32 [n]: which part each place belongs to.
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None
    note: str = ""
    """What else there is to say of the row."""
    classes: np.ndarray | None = None
    """The class of each place by its number, int32 [n], -1 where it has none."""
    label: int | None = None
    """The class of the whole row by its number."""
    written: bool = False
    """Whether it is what the decoder writes: ids of the targets' vocabulary, if they have one."""


class Objective(Protocol):
    """A frozen dataclass of settings with these five methods."""

    needs: ClassVar[ModelNeeds]

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

        Text arrives as ``tokens`` int32 [n], with ``document_ends`` and ``sentence_ends`` int32,
        positions in (0, n] after which one ends. With ``WindowSpec.other``, ``other_tokens`` and
        ``other_sentence_ends`` are those of the second window.

        Images arrive as ``image`` uint8 [side, side, channels] and ``label`` int32 []; with
        ``WindowSpec.other``, in training, ``other_image`` and ``other_label`` are of the second
        one. ``sequence_length`` is then the side.
        """

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """Sums and weights of one (micro-)batch."""

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        """What a row from ``prepare`` holds, for people to read."""
