"""Tokenizes documents into sentences, for token stores.

A document is tokenized as a whole, and the ends of sentences follow from character positions. It is
cut only where that changes no id (`Tokenizer.safe_cut`), which bounds the memory, and which is
faster where these positions are not (`Tokenizer.finds_ends`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from flax_transformers.data.sources.documents import Document
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.data.tokenizers.sentences import sentence_ends

_CHUNK = 1 << 18  # characters tokenized at once
T = TypeVar("T")
_PART = 1 << 14  # a longer text is cut where that changes no id


def encode_documents(
    documents: Iterable[tuple[int, Document]],
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer | None = None,
) -> Iterator[list[tuple[Document, list[np.ndarray]]]]:
    """Numbered documents with the token ids of each of their sentences, in chunks.

    A token belongs to the sentence in which it ends, so a sentence may be empty; concatenated, the
    sentences are the ids of the text. ``target_tokenizer``: for the second texts of pairs, if it is
    another one. Separate texts count as sentences. If one of them has no token, the document has no
    sentences; in a labelled document the text becomes the unknown token instead.
    """
    numbered = (document for _, document in documents)
    for chunk in _groups(numbered, lambda document: len(document.whole)):
        yield list(zip(chunk, _encode(chunk, tokenizer, target_tokenizer), strict=True))


def encode_sentences(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[np.ndarray]]:
    """The token ids of each sentence of each text; concatenated, ``encode_batch([text])``."""
    counts, parts = [], []
    for text in texts:
        several = _parts(tokenizer, text)
        counts.append(len(several))
        parts += several
    encoded = _encode_parts(tokenizer, parts)
    for count in counts:
        yield _sentences(list(itertools.islice(encoded, count)))


def _groups(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in order, in groups of about ``_CHUNK`` characters, or of one item."""
    group: list[T] = []
    total = 0
    for item in items:
        size = characters(item)
        if group and total + size > _CHUNK:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def _encode(
    documents: list[Document], tokenizer: Tokenizer, target_tokenizer: Tokenizer | None
) -> Iterator[list[np.ndarray]]:
    whole = (document.text for document in documents if isinstance(document.text, str))
    sentences = encode_sentences(tokenizer, whole)
    several = [document for document in documents if not isinstance(document.text, str)]
    apart = _encode_apart(several, tokenizer, target_tokenizer)
    unknown = tokenizer.vocabulary.unk_id
    for document in documents:
        if isinstance(document.text, str):
            yield next(sentences)
            continue
        ids = next(apart)
        if document.labels and unknown is not None:
            ids = [one if len(one) else np.array([unknown], np.int32) for one in ids]
        yield ids if all(map(len, ids)) else []


def _encode_apart(
    documents: list[Document], tokenizer: Tokenizer, target_tokenizer: Tokenizer | None
) -> Iterator[list[np.ndarray]]:
    """The ids of each text of documents with several texts."""
    if target_tokenizer is not None:
        sources, targets = zip(*(document.text for document in documents), strict=True)
        sides = tokenizer.encode_batch(sources), target_tokenizer.encode_batch(targets)
        yield from map(list, zip(*sides, strict=True))
        return
    texts = [text for document in documents if not document.words for text in document.text]
    encoded = iter(tokenizer.encode_batch(texts))
    words = iter(tokenizer.encode_words([d.text for d in documents if d.words]))
    for document in documents:
        if document.words:
            yield next(words)
        else:
            yield list(itertools.islice(encoded, len(document.text)))


class _Part(NamedTuple):
    """A part of a text that is tokenized separately, and the positions of sentence ends in it."""

    text: str
    ends: list[int]

    @property
    def needs_offsets(self) -> bool:
        return bool(self.ends) and self.ends[0] < len(self.text)


def _parts(tokenizer: Tokenizer, text: str) -> list[_Part]:
    ends = sentence_ends(text)
    if not ends:
        return []
    if tokenizer.safe_cut is None:
        return [_Part(text, ends)]
    found, first = [], 0
    for start, stop in itertools.pairwise(_cuts(tokenizer, text, ends)):
        last = first
        while last < len(ends) and ends[last] <= stop:
            last += 1
        found.append(_Part(text[start:stop], [end - start for end in ends[first:last]]))
        first = last
    return found


def _cuts(tokenizer: Tokenizer, text: str, ends: Sequence[int]) -> Iterator[int]:
    """0, the positions at which a text is cut, and its length."""
    cut = tokenizer.safe_cut
    assert cut is not None
    start = 0
    yield start
    for end in ends:
        if tokenizer.finds_ends and end < len(text) and end - start < _PART:
            continue
        if end < len(text) and not cut.match(text, end):
            continue
        while end - start > _PART:
            match = cut.search(text, start + _PART, end)
            if match is None or match.start() == end:
                break
            start = match.start()
            yield start
        start = end
        yield start


def _encode_parts(
    tokenizer: Tokenizer, parts: Sequence[_Part]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The ids of each part, and the indices at which sentences end."""
    for batch in _groups(parts, lambda part: len(part.text)):
        plain = iter(tokenizer.encode_batch([p.text for p in batch if not p.needs_offsets]))
        several = [part for part in batch if part.needs_offsets]
        located = iter(
            tokenizer.encode_with_ends([p.text for p in several], [p.ends for p in several])
        )
        for part in batch:
            if part.needs_offsets:
                yield next(located)
            else:
                ids = next(plain)
                yield ids, [len(ids)] * len(part.ends)


def _sentences(encoded: Sequence[tuple[np.ndarray, list[int]]]) -> list[np.ndarray]:
    """The ids of the sentences of a text, from those of its parts."""
    if not encoded:
        return []
    ends: list[int] = []
    total = 0
    for ids, counts in encoded:
        ends += [total + count for count in counts]
        total += len(ids)
    ids = encoded[0][0] if len(encoded) == 1 else np.concatenate([ids for ids, _ in encoded])
    ends[-1] = total  # trailing characters that the last token does not cover
    return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]
