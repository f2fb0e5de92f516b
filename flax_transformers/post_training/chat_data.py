"""Conversations as prepared data: a token store with what is learned, and examples of it.

A document of the store is a conversation, or the completions of one prompt; its "sentences" are the
token ids of each sequence, prompt included. Its labels say which tokens are learned: the number of
sequences, and for each the number of spans and their starts and ends. Its record has the scores of
the sequences and the margin, float32.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.base import Compare, Tokenizers
from flax_transformers.data.config import TextData
from flax_transformers.data.pair_examples import pack
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.prepare.shards import StoreJob
from flax_transformers.data.prepare.text import PreparedText, TextPreparation
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import Split, TokenStore
from flax_transformers.data.store.tokenizer import at_hand, load
from flax_transformers.data.tokenizers.facts import TEMPLATE_FILE
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.generation.prompts import with_frame
from flax_transformers.objectives.base import Frame, WindowSpec
from flax_transformers.post_training.chat_template import (
    ChatTemplate,
    TemplateError,
    common_prefix,
    template_in,
    template_of,
)
from flax_transformers.post_training.conversations import Conversation, ConversationSource

log = logging.getLogger(__name__)
_CHUNK = 64  # conversations encoded at once
_DUMMY = 4  # tokens of a sequence of the dummy example
_BUCKET_THREADS = 16


@dataclass(frozen=True)
class ConversationSpec(WindowSpec):
    """How conversations are packed: sequences of ``length`` tokens in all.

    Attributes:
      completions: maximum number of sequences in a row, if documents are learned from by comparing
        their completions; 0: of each document the first (best) sequence is learned.
      target_length: for an encoder-decoder, maximum number of tokens of an answer, of which each
        row has one, with at most ``length`` tokens before it; else 0.
      reference: whether examples come with log-probabilities of a reference model.
    """

    data: ClassVar[str | None] = "ChatData"

    completions: int = 0
    target_length: int = 0
    reference: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatData(TextData):
    """Conversations and preferences, prepared as a token store.

    ``template_path``: a file with the chat template; by default that of the tokenizer's files, or
    else ChatML. It is saved with every checkpoint.
    """

    # Other sources than those of text.
    source: ConversationSource = field(default_factory=ConversationSource)  # type: ignore[assignment]
    validation_source: ConversationSource | None = None  # type: ignore[assignment]
    template_path: str | None = None

    def _settings(self) -> dict[str, Any]:
        given = self.template_path
        return super()._settings() | {"template": given and digest({"text": template_in(given)})}

    def held_out_kind(self) -> type[ChatData]:
        return _HeldOutChat

    def preparation(
        self,
        output: str | os.PathLike[str] | None = None,
        of_run: Tokenizers = MappingProxyType({}),
        *,
        tokenizer: Tokenizer | None = None,
    ) -> ChatPreparation:
        if self.target_tokenizer is not None:
            raise UserError("target_tokenizer is for pairs of texts; leave it out of ChatData")
        made = super().preparation(output, of_run, tokenizer=tokenizer)
        return ChatPreparation(**vars(made), template_path=self.template_path)

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        if not isinstance(spec, ConversationSpec):
            raise UserError(
                f"objective {objective} does not learn from conversations, but data is a ChatData; "
                "choose SupervisedFineTuning, RewardModel or DirectPreference, or other data"
            )

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        assert isinstance(spec, ConversationSpec)
        count = 2 if spec.completions else 1
        each = min(_DUMMY, spec.length // count)
        learned = np.ones(count * each, bool)
        learned[::each] = False
        example = {
            "tokens": np.full(count * each, token, np.int32),
            "ends": np.arange(1, count + 1, dtype=np.int32) * np.int32(each),
            "learned": learned,
            "elements": np.array([count], np.int32),
            "scores": np.arange(count, 0, -1, dtype=np.float32),
            "margins": np.zeros(1, np.float32),
        }
        if spec.reference:
            example["reference"] = np.zeros(count, np.float32)
        return example


class _HeldOutChat(ChatData):
    RANGES: ClassVar[ranges.Ranges] = {"validation_fraction": ranges.SHARE}


@dataclass(frozen=True)
class ChatJob(StoreJob):
    """Tokenizes conversations by a template."""

    template: ChatTemplate = field(default_factory=ChatTemplate)

    def encoded(
        self, documents: Iterable[tuple[int, Document]], counts: Counts
    ) -> Iterator[list[tuple[Document, list[np.ndarray]]]]:
        chunk: list[tuple[Document, list[np.ndarray]]] = []
        for _, document in documents:
            assert isinstance(document, Conversation)
            try:
                sequences, spans = encode(document, self.template, self.tokenizer)
            except TemplateError as error:
                if self.corpus.source.on_invalid == "error":
                    raise UserError(
                        f"{document.where} cannot be rendered: {error}; correct it, or set "
                        "on_invalid to skip"
                    ) from error
                counts.invalid += 1
                continue
            labels = [len(sequences)]
            for of_sequence in spans:
                labels += [len(of_sequence), *(place for span in of_sequence for place in span)]
            numbers = np.array([*document.scores, document.margin], "<f4")
            arrays = np.array(labels, np.int32), np.frombuffer(numbers.tobytes(), np.uint8)
            chunk.append((replace(document, arrays=arrays), sequences))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


Spans = list[tuple[int, int]]


def encode(
    document: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[list[np.ndarray], list[Spans]]:
    """The ids of each sequence, int32 [n], and the spans of tokens that are learned.

    Of conversations these are the tokens of assistant turns. They are those of ``transformers``,
    except that a last character of several tokens counts as a whole. Of completions they are the
    tokens from `ChatTemplate.start_of` the first turn; of plain texts those after what they have in
    common with the prompt's. Raises `TemplateError`.
    """
    whole = document.completions[0]
    if not document.prompt and not isinstance(whole, str) and len(document.completions) == 1:
        text, turns = template.rendered(whole, document.tools)
        ids, offsets = tokenizer.encode_prompt_with_offsets(text)
        if not len(ids):
            raise TemplateError(f"{template.place} writes nothing")
        return [ids], [turn_token_spans(turns, offsets)]
    if isinstance(whole, str):
        sequences, start = _of_texts(document, tokenizer)
    else:
        sequences, start = _of_messages(document, template, tokenizer)
    if not all(map(len, sequences)):
        raise TemplateError(f"{template.place} writes nothing")
    return sequences, [[(start, len(ids))] if start < len(ids) else [] for ids in sequences]


def _of_texts(document: Conversation, tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
    """The ids of the prompt with each completion, and the first token that is learned."""
    vocabulary = tokenizer.vocabulary
    frame = Frame() if vocabulary.frame is None else Frame(vocabulary.frame.before)
    prompt, *sequences = (
        with_frame(frame, tokenizer.encode_prompt(f"{document.prompt or ''}{answer}").tolist())
        for answer in ("", *document.completions)
    )
    for ids in sequences:
        if vocabulary.end_id is not None and ids[-1:] != [vocabulary.end_id]:
            ids.append(vocabulary.end_id)
    start = min(common_prefix(prompt, ids) for ids in sequences)
    return [np.array(ids, np.int32) for ids in sequences], start


def _of_messages(
    document: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[list[np.ndarray], int]:
    """See `_of_texts`."""
    sequences, starts, before = [], [], len(document.prompt)
    for completion in document.completions:
        messages = [one for one in (*document.prompt, *completion) if not isinstance(one, str)]
        text = template.render(messages, document.tools)
        start = template.start_of(text, messages, document.tools, before)
        ids, offsets = tokenizer.encode_prompt_with_offsets(text)
        sequences.append(ids)
        starts.append(int(np.count_nonzero(offsets[:, 1] <= start)))
    return sequences, min(starts)


def turn_token_spans(turns: Sequence[tuple[int, int]], offsets: np.ndarray) -> Spans:
    """The spans of tokens that have a character of a turn.

    ``turns``: starts and ends in characters; ``offsets`` int [n, 2]: those of the tokens.
    """
    found = []
    for start, end in turns:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        if len(inside):
            found.append((int(inside[0]), int(inside[-1]) + 1))
    return found


@dataclass(frozen=True, kw_only=True)
class ChatPreparation(TextPreparation):
    """How a store of conversations is prepared."""

    template_path: str | None = None

    def make_job(
        self,
        claimed: dict[str, Any],
        given: Tokenizer | None,
        given_target: Tokenizer | None = None,
    ) -> ChatJob:
        job = super().make_job(claimed, given, given_target)
        template = template_of(job.tokenizer, self.template_path)
        return ChatJob(job.folder, job.corpus, claimed, job.tokenizer, template=template)

    def read_store(self, *, verified: bool, compare: Compare) -> PreparedChat:
        found = super().read_store(verified=verified, compare=compare)
        template = template_of(found.tokenizer, self.template_path)
        own = self.template_path is None and self.given is None and at_hand(self.tokenizer)
        if own and template_of(load(self.tokenizer)).source != template.source:
            raise UserError(
                f"The token store in {found.directory} was made with another chat template than "
                f"{self.tokenizer.path} has now; choose another store directory, or delete that "
                "one to prepare it again."
            )
        tokenizer = copy.copy(found.tokenizer)
        # The template goes with the tokenizer, into checkpoints and what is exported.
        tokenizer.files = {**tokenizer.files, TEMPLATE_FILE: template.source.encode()}
        return PreparedChat(**vars(found) | {"tokenizer": tokenizer}, template=template)


@dataclass(frozen=True)
class PreparedChat(PreparedText):
    """Conversations in a token store (a `Dataset`).

    ``reference``: log-probabilities of a reference model, float32 [sequences], by the fingerprint
    of the split's store.
    """

    template: ChatTemplate = field(default_factory=ChatTemplate)
    reference: Mapping[str, np.ndarray] = field(default_factory=dict)

    def examples(self, split: Split, spec: WindowSpec) -> Examples | None:
        store = self.train if split == "train" else self.validation
        if store is None:
            return None
        if not isinstance(spec, ConversationSpec):
            raise UserError(
                f"The token store in {self.directory} contains conversations; choose the objective "
                "SupervisedFineTuning, RewardModel or DirectPreference."
            )
        return ConversationExamples(store, spec, self.reference.get(store.fingerprint))


class ConversationExamples(Examples):
    """Packed conversations of one split, in the form of ``prepare`` of `ConversationSpec`.

    The packing is fixed, so that each row is one example and every epoch shuffles the rows. Tokens
    after the last assistant turn that fits as a whole are left out; documents without one, or whose
    completions do not fit, are left out and counted (``left_out``).

    An example has ``tokens`` int32 [n] of its sequences, which end at ``ends`` int32 [S]; whether
    each is ``learned`` bool [n]; ``elements`` int32 [E], the number of sequences of each document;
    ``scores`` float32 [S] and ``margins`` float32 [E]; and with a reference its log-probabilities
    ``reference`` float32 [S].

    Raises UserError if no document fits.
    """

    def __init__(
        self, store: TokenStore, spec: ConversationSpec, reference: np.ndarray | None = None
    ) -> None:
        self.store, self.spec, self._reference = store, spec, reference
        self.read_threads = 0 if store.is_local else _BUCKET_THREADS
        self._first = np.concatenate([np.zeros(1, np.int64), _sequences_before(store)])
        self._edges: np.ndarray | None = _edges(store)
        sizes = np.zeros((store.num_documents, 2), np.int64)
        cut = 0
        for document in range(store.num_documents):
            sizes[document], shorter = self._size(document)
            cut += shorter
        documents = np.flatnonzero(sizes[:, 0])
        self.left_out = len(sizes) - len(documents)
        self._say(cut)
        self._pack(documents, sizes[documents])

    def _pack(self, documents: np.ndarray, sizes: np.ndarray) -> None:
        """Divides ``documents`` among the rows; ``sizes`` int64 [documents, 2], as of `_size`."""
        spec, self._documents = self.spec, documents
        self._ends = np.arange(1, len(documents) + 1)
        if spec.cross_documents and not spec.target_length:
            order, self._ends = pack(sizes, (spec.length, spec.completions or spec.length))
            self._documents = documents[order]

    @property
    def documents(self) -> np.ndarray:
        """The documents that are learned from: int64 [n]."""
        return np.sort(self._documents)

    def limited(self, chosen: np.ndarray) -> ConversationExamples:
        """The documents with the numbers ``chosen`` in `documents`, packed."""
        documents, found = self.documents[chosen], copy.copy(self)
        sizes = [self._size(document)[0] for document in documents.tolist()]
        found._pack(documents, np.array(sizes, np.int64).reshape(-1, 2))
        return found

    def _size(self, document: int) -> tuple[tuple[int, int], bool]:
        """Tokens and sequences of a document in a row, 0 if it is left out; whether it is cut."""
        spans, lengths = self._spans(document), self._lengths(document)
        if self.spec.completions:
            total = int(lengths.sum())
            fits = total <= self.spec.length and len(lengths) <= self.spec.completions
            learned = all(spans) and len(lengths) > 1
            return ((total, len(lengths)) if fits and learned else (0, 0)), False
        kept = self._kept(spans[0])
        return ((kept[-1][1], 1) if kept else (0, 0)), bool(kept) and len(kept) < len(spans[0])

    def _kept(self, spans: Spans) -> Spans:
        """The spans that are learned: whole ones, and for an encoder-decoder the last of them."""
        spec = self.spec
        if not spec.target_length:
            return [span for span in spans if span[1] <= spec.length]
        fitting = [(a, b) for a, b in spans if a <= spec.length and b - a <= spec.target_length]
        return fitting[-1:]

    def _say(self, cut: int) -> None:
        total = self.store.num_documents
        if self.left_out == total:
            fault = (
                f"has at least two completions that together fit into {self.spec.length} tokens, "
                f"at most {self.spec.completions} of them; use longer sequences, or preferences as "
                "data"
                if self.spec.completions
                else f"has an assistant turn that ends within {self.spec.length} tokens; use "
                "longer sequences"
            )
            raise UserError(f"None of the {total} conversations of {self.store.directory} {fault}.")
        if self.left_out or cut:
            log.warning(
                "%d of %d conversations of %s (%s) do not fit into %d tokens and are left out, %d "
                "are cut after an assistant turn",
                self.left_out, total, self.store.directory, self.store.split, self.spec.length, cut,
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_edges": None}

    def __len__(self) -> int:
        return len(self._ends)

    def documents_of(self, index: int) -> np.ndarray:
        """The documents of an example, int64 [E]."""
        first = self._ends[index - 1] if index else 0
        return self._documents[first : self._ends[index]]

    def numbers_of(self, index: int) -> np.ndarray:
        """The numbers in the split of the sequences of an example, int64 [S]."""
        used = [
            self.sequences_of(document)[: None if self.spec.completions else 1]
            for document in self.documents_of(index).tolist()
        ]
        return np.concatenate([np.asarray(numbers, np.int64) for numbers in used])

    def sequences_of(self, document: int) -> range:
        """The numbers of a document's sequences in the split."""
        return range(int(self._first[document]), int(self._first[document + 1]))

    def _spans(self, document: int) -> list[Spans]:
        labels = self.store.labels(document).tolist()
        found, place = [], 1
        for _ in range(labels[0]):
            count = labels[place]
            flat = labels[place + 1 : place + 1 + 2 * count]
            found.append(list(zip(flat[::2], flat[1::2], strict=True)))
            place += 1 + 2 * count
        return found

    def _lengths(self, document: int) -> np.ndarray:
        if self._edges is None:
            self._edges = _edges(self.store)
        numbers = self.sequences_of(document)
        return np.diff(self._edges[numbers.start : numbers.stop + 1])

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens, learned, scores, margins, counts, reference = [], [], [], [], [], []
        for document in self.documents_of(index).tolist():
            spans, lengths = self._spans(document), self._lengths(document)
            numbers = np.frombuffer(self.store.record(document), "<f4")
            used = len(lengths) if self.spec.completions else 1
            assert self._edges is not None
            for sequence, number in zip(range(used), self.sequences_of(document), strict=False):
                kept = spans[sequence] if self.spec.completions else self._kept(spans[sequence])
                length = int(lengths[sequence]) if self.spec.completions else kept[-1][1]
                tokens.append(self.store.tokens(int(self._edges[number]), length))
                mask = np.zeros(length, bool)
                for start, end in kept:
                    mask[start:end] = True
                learned.append(mask)
                if self._reference is not None:
                    reference.append(self._reference[number])
            scores.append(numbers[:used] if len(numbers) > used else np.zeros(used, np.float32))
            margins.append(numbers[-1])
            counts.append(used)
        example = {
            "tokens": np.concatenate(tokens),
            "ends": np.cumsum([len(one) for one in tokens], dtype=np.int32),
            "learned": np.concatenate(learned),
            "elements": np.array(counts, np.int32),
            "scores": np.concatenate(scores).astype(np.float32),
            "margins": np.array(margins, np.float32),
        }
        if reference:
            example["reference"] = np.array(reference, np.float32)
        return example


def _edges(store: TokenStore) -> np.ndarray:
    """Ends of all sequences, from 0: int64 [sequences + 1]."""
    return np.concatenate([np.zeros(1, np.int64), store.sentence_ends])


def _sequences_before(store: TokenStore) -> np.ndarray:
    """Number of sequences up to each document: int64 [documents]."""
    return np.searchsorted(store.sentence_ends, store.document_ends, side="right")
