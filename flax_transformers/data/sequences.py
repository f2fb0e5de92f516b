"""Training data from Python: any object with ``__len__`` and ``__getitem__``, or a generator.

A sequence (a list, a `grain.MapDataset`, a Hugging Face dataset) is shuffled and resumed exactly,
on any number of hosts and workers, like prepared stores. A generator is read in its own order; a
run that resumes starts it again, and a warning says so.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from flax_transformers.data.base import Compare, DataConfig, Dataset, DatasetDefaults
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.loader import Seed, key_of, stacked
from flax_transformers.data.sources.documents import listed
from flax_transformers.data.store.token_store import Split
from flax_transformers.data.tokenizers.encoding import encode_sentences
from flax_transformers.data.tokenizers.fitting import padded_vocabulary
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Objective, Vocabulary, WindowSpec
from flax_transformers.objectives.labelled import LabelledSpec

log = logging.getLogger(__name__)
_NO_TEXT = Vocabulary(size=1, pad_id=0)


class PythonSequence(Protocol):
    """A Python sequence. Worker processes receive a pickled copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class SequenceDataset(DatasetDefaults):
    """Python sequences as a `Dataset`.

    ``train``, ``validation``: sequences of examples. An example is a dict of numpy arrays, or,
    with a ``tokenizer``, a text or a dict with a text under "text". Texts are tokenized when they
    are read; each is one example, cut to the sequence length, and to whole sentences if the
    objective reads where they end. For an objective that classifies texts, the number of the class
    is under "label". ``input_ids`` without ``tokens`` are the ids of one text, and cut like it.
    ``prepared``: examples are rows as the model takes them (``input_ids`` ...), of equal shapes.
    False: they are the raw input of the objective's ``prepare`` (``tokens`` ...).
    ``tokenizer``: also saved with checkpoints. ``vocab``: special ids for the objective, if
    examples are token ids and there is no tokenizer.
    ``name``: identifies the data. A run resumes only with data of the same name and lengths: the
    content of a Python sequence is not checked. ``former_name``: what earlier versions called the
    same data.
    """

    train: PythonSequence
    validation: PythonSequence | None = None
    prepared: bool = False
    tokenizer: Tokenizer | None = None
    vocab: Vocabulary | None = None
    label_names: tuple[str, ...] = ()
    name: str = "Python sequence"
    former_name: str | None = None

    @property
    def directory(self) -> str:
        return self.name

    @property
    def fingerprint(self) -> str:
        return self._named(self.name)

    @property
    def known_as(self) -> tuple[str, ...]:
        return () if self.former_name is None else (self._named(self.former_name),)

    def _named(self, name: str) -> str:
        tokenizer = None if self.tokenizer is None else self.tokenizer.fingerprint
        made_of = (name, len(self.train), tokenizer, self.label_names)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    @property
    def summary(self) -> str:
        held_out = 0 if self.validation is None else len(self.validation)
        return f"{len(self.train):,} training examples, {held_out:,} held out"

    @property
    def vocabulary(self) -> Vocabulary:
        if self.vocab is not None:
            return self.vocab
        return _NO_TEXT if self.tokenizer is None else self.tokenizer.vocabulary

    def examples(self, split: Split, spec: WindowSpec) -> SequenceExamples | None:
        items = self.train if split == "train" else self.validation
        if items is None:
            return None
        return SequenceExamples(items, spec, self.tokenizer, self.prepared, split == "train")

    def fitted(self, vocab_size: int, pad_id: int, target_vocab_size: int) -> SequenceDataset:
        known = padded_vocabulary(self.vocabulary, vocab_size, pad_id)
        return self if known == self.vocabulary else replace(self, vocab=known)


@dataclass(frozen=True, kw_only=True)
class PythonData(DataConfig):
    """Data for a config file that Python code loads: subclass it and return the data in ``load``.

    ``load`` is called a few times at the start of a run, in every process, and must return the same
    data each time; usually a `SequenceDataset`. Nothing is written to a store.
    """

    def load(self) -> Dataset:
        raise NotImplementedError(f"{type(self).__name__} has no load()")

    def preparation(
        self, output: object = None, of_run: Mapping[str, Tokenizer] = MappingProxyType({})
    ) -> LoadedData:
        return LoadedData(self)

    @property
    def has_prepared_rows(self) -> bool:
        return bool(getattr(self.load(), "prepared", False))

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        examples = self.load().examples("train", spec)
        if examples is None or not len(examples):
            raise UserError(f"{type(self).__name__}.load() gives no training examples.")
        return examples.read(0, np.random.default_rng(0))


@dataclass(frozen=True)
class LoadedData:
    """The `Preparation` of `PythonData`: there is nothing to prepare."""

    data: PythonData

    def check(self) -> None:
        self.data.load()

    def is_finished(self) -> bool:
        return True

    def run(self, compare: Compare = "sizes") -> Dataset:
        return self.data.load()

    def begin(self) -> None:
        """There is nothing to do."""

    def share(self, job: int, jobs: int) -> Dataset:
        return self.data.load()

    def open(self, compare: Compare = "nothing") -> Dataset:
        return self.data.load()


@dataclass(frozen=True)
class SequenceExamples(Examples):
    """The items of a sequence as examples; see `SequenceDataset`."""

    items: PythonSequence
    spec: WindowSpec
    tokenizer: Tokenizer | None = None
    is_prepared: bool = False
    training: bool = True
    """Whether images come with a second one; a text does so in evaluation too."""

    def __len__(self) -> int:
        return len(self.items)

    @property
    def plain(self) -> SequenceExamples:
        return replace(self, training=False)

    @property
    def classes(self) -> np.ndarray | None:
        """The sequence's own ``labels``, integers [n], if it has such."""
        return getattr(self.items, "labels", None)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = raw_example(self.items[index], self.spec, self.tokenizer)
        wanted = self.spec.other and (self.training or "tokens" in example)
        if wanted and not self.is_prepared and "other_tokens" not in example:
            other = (index + 1 + int(rng.integers(max(1, len(self) - 1)))) % len(self)
            second = raw_example(self.items[other], self.spec, self.tokenizer)
            example |= {f"other_{n}": a for n, a in second.items() if n != "document_ends"}
        return example


class RawExample(dict[str, np.ndarray]):
    """The arrays of an example, with the ends of a text that is given by its ids alone.

    Raises UserError for others that an objective reads and the example does not have.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        super().__init__(arrays)
        self.length = length

    def __missing__(self, name: str) -> np.ndarray:
        ids = self.get("tokens", self.get("input_ids"))
        if ids is not None and ids.ndim == 1 and name in ("tokens", "document_ends"):
            if "tokens" in self and len(ids) > self.length:
                raise UserError(
                    f"an example has {len(ids):,} tokens, but {self.length:,} fit into a sequence; "
                    "cut its tokens"
                )
            whole = [len(ids)] if len(ids) <= self.length else []
            return ids[: self.length] if name == "tokens" else np.array(whole, np.int32)
        if ids is not None and ids.ndim == 1 and name == "sentence_ends":
            return np.array([min(len(ids), self.length)], np.int32)
        raise UserError(
            f"an example has no {name!r}, which the objective reads; it has {listed(self)}: add "
            "it, or prepare the data from files"
        )


def raw_example(item: Any, spec: WindowSpec, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    """An item of a sequence or generator as arrays; a text as the tokens of one document.

    Raises UserError for anything else than a dict of arrays, a text, or a dict with a text.
    """
    text = item if isinstance(item, str) else None
    if isinstance(item, Mapping):
        text = item.get("text")
        if not isinstance(text, str):
            arrays = {str(name): np.asarray(value) for name, value in item.items()}
            return RawExample(arrays, spec.length)
    if text is None:
        raise UserError(
            f"an example is a {type(item).__name__}; give dicts of numpy arrays, texts, or dicts "
            'with a "text"'
        )
    if tokenizer is None:
        raise UserError("examples are texts; give the data a tokenizer")
    (sentences,) = encode_sentences(tokenizer, [text])
    tokens = np.concatenate([np.zeros(0, np.int32), *sentences])
    ends = np.unique(np.cumsum([len(one) for one in sentences], dtype=np.int32))
    ends = ends[ends > 0]
    kept = _length(ends, spec) if len(ends) else 0
    if kept < 1:
        raise UserError(f"an example has no text: {text[:40]!r}; leave it out")
    if isinstance(spec, LabelledSpec):
        labels = _label(item, spec)
        return RawExample({"tokens": tokens, "text_ends": ends[-1:], **labels}, spec.length)
    arrays = {
        "tokens": tokens[:kept],
        "document_ends": ends[-1:][ends[-1:] == kept],
        "sentence_ends": ends[ends <= kept],
    }
    return RawExample(arrays, spec.length)


def _label(item: Any, spec: LabelledSpec) -> dict[str, np.ndarray]:
    """The label of a dict with a text; nothing for objectives that learn others than one."""
    if not isinstance(item, Mapping) or "label" not in item or spec.rows != "document":
        return {}
    is_number = spec.labels == "numbers"
    label = np.asarray(item["label"])
    if label.ndim or not np.issubdtype(label.dtype, np.number if is_number else np.integer):
        wanted = "a number" if is_number else "the number of its class, from 0"
        raise UserError(f"an example has the label {item['label']!r}; give {wanted}")
    return {"labels": label.reshape(1).astype(np.float32 if is_number else np.int32)}


def _length(ends: np.ndarray, spec: WindowSpec) -> int:
    """Number of tokens that are kept of a text with sentences that have these ``ends``.

    Where the objective pairs sentences, none is cut that is not longer than the example: a pair
    with half a sentence could be told from others by its length.
    """
    kept = min(int(ends[-1]), spec.length)
    if spec.sentences is not None:
        kept = min(kept, int(ends[: spec.sentences][-1]))
    whole = ends[ends <= kept] if spec.whole_sentences and spec.sentence_ends else ends[:0]
    return int(whole[-1]) if len(whole) else kept


class GeneratorBatches(Iterator[dict[str, np.ndarray]]):
    """Batches of the items that a generator yields, in its order; it starts again at its end.

    ``generate``: called for each pass, without arguments. Items are as in `SequenceDataset`, but
    for an objective that draws a second example for each (``WindowSpec.other``), such as
    NextSentence, they are dicts that contain it.
    ``rows``: the rows of each global batch that this host makes, default all; every host reads the
    whole generator. Without exact resume: set to another ``position`` than 0, the stream logs that
    the generator starts from its beginning.
    """

    def __init__(
        self,
        generate: Callable[[], Iterable[Any]],
        objective: Objective,
        vocab: Vocabulary,
        *,
        sequence_length: int,
        batch_size: int,
        seed: Seed = 0,
        rows: Sequence[int] | np.ndarray | None = None,
        prepared: bool = False,
        tokenizer: Tokenizer | None = None,
        position: int = 0,
    ) -> None:
        self._generate, self._objective, self._vocab = generate, objective, vocab
        self._length, self._size = sequence_length, batch_size
        self._rows = range(batch_size) if rows is None else [int(row) for row in rows]
        self._prepared, self._tokenizer = prepared, tokenizer
        self._spec = objective.window_spec(sequence_length)
        self._key = key_of("train", seed)
        self._items = self._endless()
        self.position = position
        if position:
            log.warning(
                "the training data comes from a generator, which cannot resume at example %d: it "
                "starts from its beginning",
                position,
            )

    def _endless(self) -> Iterator[Any]:
        while True:
            items = iter(self._generate())
            first = next(items, None)
            if first is None:
                raise UserError("The generator of the training data yields nothing.")
            yield first
            yield from items

    def __next__(self) -> dict[str, np.ndarray]:
        items = list(itertools.islice(self._items, self._size))
        batch = stacked([self._row(items[row], self.position + row) for row in self._rows])
        self.position += self._size
        return batch

    def _row(self, item: Any, number: int) -> dict[str, np.ndarray]:
        row = raw_example(item, self._spec, self._tokenizer)
        if not self._prepared:
            if self._spec.other and not any(name.startswith("other_") for name in row):
                raise UserError(
                    "the objective draws a second example for each, which a generator cannot give; "
                    "use a SequenceDataset, or yield the second one too (other_tokens ...)"
                )
            rng = np.random.Generator(
                np.random.Philox(key=np.array([self._key, number], np.uint64))
            )
            row = self._objective.prepare(row, rng, self._vocab, self._length)
        return {**row, "example_id": np.array(number, np.int64)}

    def close(self) -> None:
        """There are no workers to end."""
