"""The contract of objectives, and the records that it passes.

An objective has two halves. ``prepare`` runs on the host, in numpy, on one example at a time, and
returns arrays of fixed shape. ``terms`` runs in jax, on one batch at a time, and returns sums and
weights. The data pipeline uses only the first half, the training step only the second.

Shape suffixes in this folder: B batch, T length, S source length, M predicted positions, D width,
V vocabulary, C classes or channels, H and W height and width of an image, K values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

Array = Any  # jax.Array or np.ndarray: data workers import this file, which must not import jax
Arrays = dict[str, np.ndarray]  # one raw or prepared example
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Rngs = Mapping[str, Array]
Rng = np.random.Generator


@dataclass(frozen=True)
class Frame:
    """Ids of the special tokens ``before`` and ``after`` one text. Of two texts, the second has
    ``before_second`` before it, or ``before`` again if that is None."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    before_second: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What an objective knows of a tokenizer: its size and its special ids.

    The id of a role is None if the tokenizer has no such token.

    Attributes:
      size: number of ids.
      pad_id: id that sequences are padded with. If the tokenizer has no padding token (GPT-2,
        Llama, Mistral), ``has_pad`` is False and ``pad_id`` is the id of another token, which only
        masks distinguish from text.
      special_ids: all special ids.
      sentinel_ids: ids of sentinels, in the order of use (T5's ``<extra_id_0>`` first).
      word_start: bool [size], True for tokens that begin a word; None if unknown.
      target: vocabulary of the targets of pairs, if these have a tokenizer of their own.
      frame: special tokens that the tokenizer's own files put around one text; None for a tokenizer
        trained here, whose texts are framed by the objective.
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
        """The id that ends a text: of </s> or the like, else of [SEP], else None."""
        return self.sep_id if self.eos_id is None else self.eos_id

    @property
    def of_targets(self) -> Vocabulary:
        """The vocabulary of targets: their own, or this one."""
        return self if self.target is None else self.target

    @property
    def roles(self) -> dict[str, int]:
        """Ids by role ("pad", "unk", "cls" ...), for roles that the tokenizer has a token for."""
        names = ("unk", "cls", "sep", "mask", "bos", "eos")
        found = {name: getattr(self, f"{name}_id") for name in names}
        found |= {"pad": self.pad_id if self.has_pad else None}
        return {name: i for name, i in found.items() if i is not None}

    def within(self, rows: int, pad_id: int = -1) -> Vocabulary:
        """The vocabulary without ids for which a model with ``rows`` embeddings has none.

        Roles with larger ids become None. If that removes the padding token, or the tokenizer has
        none, ``pad_id`` is used, or the id of a special token if it is -1.
        """
        lost: dict[str, Any] = {
            f"{name}_id": None for name, i in self.roles.items() if i >= rows and name != "pad"
        }
        kept = replace(self, **lost) if lost else self
        fill, has_pad = self.pad_id, self.has_pad and self.pad_id < rows
        if not has_pad:
            spare = (
                pad_id if 0 <= pad_id < rows else None,
                kept.end_id,
                kept.bos_id,
                kept.unk_id,
                0,
            )
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
    """How an objective divides a token store into windows, one for each training example.

    Attributes:
      length: maximum number of raw tokens. A document end inside the window counts as one more, for
        the separator that ``prepare`` inserts.
      cross_documents: whether windows continue across document ends (RoBERTa's "full-sentences",
        arXiv:1907.11692 section 4.2) or stop there ("doc-sentences").
      sentences: maximum number of sentences; None for no limit.
      whole_sentences: whether windows end at sentence ends, and are shorter for it; if False,
        windows have the full length.
      other: whether each window comes with a second one, drawn at random from another document.
      static_epochs: number of epochs after which the random choices of ``prepare`` repeat (static
        masking, RoBERTa section 4.1); None if they never do.
      sentence_ends: whether ``prepare`` needs ``sentence_ends``, which are read for each example.
      data: name of the only class of data configs with such examples; None for those of text.
    """

    data: ClassVar[str | None] = None

    length: int
    cross_documents: bool
    sentences: int | None = None
    whole_sentences: bool = True
    other: bool = False
    static_epochs: int | None = None
    sentence_ends: bool = True

    @property
    def target_kind(self) -> str | None:
        """What examples have besides text: "pairs", a kind of labels, or None for nothing."""
        return None

    @property
    def source_kind(self) -> str:
        """Name of the class of sources that give such documents, for messages to the user."""
        return "TextSource"

    def dummy_example(self, tokens: np.ndarray, texts: int) -> Arrays:
        """A raw example of ``tokens`` int32 [n], in documents of so many texts, for its shapes."""
        example = {"tokens": tokens, "sentence_ends": halves_of(tokens)}
        return self.with_other(example) | {"document_ends": halves_of(tokens)[-1:]}

    def with_other(self, example: Arrays) -> Arrays:
        """An example with itself as the ``other`` one, if that is asked for."""
        other = {f"other_{name}": array for name, array in example.items()}
        return example | other if self.other else example


def halves_of(tokens: np.ndarray) -> np.ndarray:
    """The ends of the halves of a dummy text, int32 [2], or of the only one, [1]."""
    count = len(tokens)
    return np.array([count // 2, count] if count > 1 else [count], np.int32)


@dataclass(frozen=True)
class ModelFunctions:
    """The parts of a model that objectives call, as pure functions of the parameters.

    Attributes:
      hidden_states: ``(params, batch, rngs)`` returns an output with ``last_hidden_state``
        [B, T, D] and ``auxiliary``: None, or statistics of the layers for a loss of their own,
        whose ``by_sequence()`` returns its sum and weight (the balance of experts). Dropout is on
        if ``rngs`` has "dropout".
      unembedding: ``(params, hidden)`` with hidden states [B, M, D] returns a
        ``models.heads.Unembedding``, whose ``logits()`` computes all logits.
      head: ``(name, params, rngs, *arrays)`` calls the model's method ``name``, such as
        "next_sentence" or "classify".
    """

    hidden_states: Callable[[Params, Batch, Mapping[str, Array]], Any]
    unembedding: Callable[[Params, Array], Any]
    head: Callable[..., Array]


@dataclass(frozen=True)
class LossTerms:
    """Contributions of one batch to the loss and the metrics, as sums.

    Attributes:
      losses: ``(sum, weight, coefficient)`` by name. The trained loss is the sum over names of
        ``coefficient * total(sum) / total(weight)``, with totals over the whole global batch. A
        weight depends only on the data, never on parameters or random numbers.
      metrics: ``(sum, count)`` by name; logged as total over total, not trained.
    """

    losses: dict[str, tuple[Array, Array, float]]
    metrics: dict[str, tuple[Array, Array]]

    def __or__(self, other: LossTerms) -> LossTerms:
        """The terms of both."""
        return LossTerms(self.losses | other.losses, self.metrics | other.metrics)


@dataclass(frozen=True)
class ModelNeeds:
    """What an objective requires of a model.

    Attributes:
      heads: names of methods, such as "unembed".
      inputs: names of inputs that the hidden states depend on.
      causal: whether attention must be causal (True), bidirectional (False), or may be either.
    """

    heads: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    causal: bool | None = None


@dataclass(frozen=True)
class ExampleView:
    """One sequence of a prepared example for ``flax-transformers inspect``, without padding."""

    name: str
    ids: np.ndarray
    """Token ids, int32 [n]."""
    labels: np.ndarray | None = None
    """Label of each position, int32 [n]; -1 where nothing is predicted."""
    segments: np.ndarray | None = None
    """Segment of each position, int32 [n]."""
    note: str = ""
    """Further information on the example."""
    classes: np.ndarray | None = None
    """Class of each position, int32 [n]; -1 where there is none."""
    label: int | None = None
    """Class of the whole example."""
    written: bool = False
    """Whether the decoder generates it: the ids are then of the targets' vocabulary."""


class Objective(Protocol):
    """A frozen dataclass of settings with these five methods.

    Members that only some objectives have, such as ``frame`` and ``whole_batch_terms``, are found
    by their names: "Optional members" of docs/extending.md.
    """

    needs: ClassVar[ModelNeeds]

    def window_spec(self, sequence_length: int) -> WindowSpec:
        """The windows of text for examples of ``sequence_length`` tokens."""

    def predictions(self, sequence_length: int) -> int:
        """Maximum number of positions of an example for which logits are computed."""

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare one training example of fixed shapes from one raw example.

        Text: ``tokens`` int32 [n], with ``document_ends`` and ``sentence_ends`` int32, positions in
        (0, n] after which one ends. With ``WindowSpec.other``, also ``other_tokens`` and
        ``other_sentence_ends`` of the second window. No sentence ends without
        ``WindowSpec.sentence_ends``.

        Images: ``image`` uint8 [side, side, channels] and ``label`` int32 []; with
        ``WindowSpec.other``, in training, also ``other_image`` and ``other_label``. For these,
        ``sequence_length`` is the side.
        """

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """Sums and weights of one (micro-)batch."""

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """Readable form of a prepared example."""
