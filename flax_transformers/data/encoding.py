"""Documents to token ids: the step of preparing a store that calls the tokenizer."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_transformers.data.documents import Document
from flax_transformers.data.sentences import split_sentences
from flax_transformers.data.tokenizers import Tokenizer

_CHUNK = 1 << 18  # characters tokenized at once


def encode_documents(
    documents: Iterable[tuple[int, Document]],
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer | None = None,
) -> Iterator[list[tuple[Document, list[np.ndarray]]]]:
    """Numbered documents with the token ids of each of their sentences, many at a time.

    ``target_tokenizer`` is that of the second texts of pairs, where it is another one. Texts that
    stand apart count as sentences; there are none where one of them has no token, but such a text
    of a labelled document, whose place counts, becomes the unknown token.
    """
    for chunk in _chunks(documents):
        yield list(zip(chunk, _encode(chunk, tokenizer, target_tokenizer), strict=True))


def _chunks(documents: Iterable[tuple[int, Document]]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for _, document in documents:
        chunk.append(document)
        characters += len(document.whole)
        if characters >= _CHUNK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(
    documents: list[Document], tokenizer: Tokenizer, target_tokenizer: Tokenizer | None
) -> Iterator[list[np.ndarray]]:
    sentences = [
        split_sentences(document.text) if isinstance(document.text, str) else document.text
        for document in documents
    ]
    if target_tokenizer is None:
        encoded = _encoded(tokenizer, [one for several in sentences for one in several])
    else:
        sources, targets = zip(*sentences, strict=True)
        sides = _encoded(tokenizer, sources), _encoded(target_tokenizer, targets)
        encoded = itertools.chain.from_iterable(zip(*sides, strict=True))
    for document, several in zip(documents, sentences, strict=True):
        ids = list(itertools.islice(encoded, len(several)))
        apart = not isinstance(document.text, str)
        unknown = tokenizer.vocabulary.unk_id
        if document.labels and unknown is not None:
            ids = [one if len(one) else np.array([unknown], np.int32) for one in ids]
        yield [] if apart and not all(map(len, ids)) else ids


def _encoded(tokenizer: Tokenizer, sentences: Sequence[str]) -> Iterator[np.ndarray]:
    """The ids of each sentence; a long document is not encoded in one call, for the memory."""
    ends = list(itertools.accumulate(map(len, sentences)))
    first = 0
    while first < len(sentences):
        limit = ends[first] + _CHUNK
        last = bisect.bisect_right(ends, limit, lo=first)
        yield from tokenizer.encode_batch(sentences[first:last])
        first = last
