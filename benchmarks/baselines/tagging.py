"""A baseline of token classification: the most frequent tag of each word."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.tagging import entity_scores, is_iob2
from flax_transformers.training.config import TrainConfig


def tagging_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """Accuracy of the most frequent training tag of each word, and entity F1 for IOB2 tags.

    Words that are not in the training text have the most frequent tag of all words.
    """
    assert prepared.validation is not None
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    overall: Counter[int] = Counter()
    for words, tags in _sentences(prepared.train, prepared.tokenizer):
        overall.update(tags)
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    usual = {word: _most_frequent(tags) for word, tags in counts.items()}
    other = _most_frequent(overall)
    held_out = list(_sentences(prepared.validation, prepared.tokenizer))
    guesses = [[usual.get(word, other) for word in words] for words, _ in held_out]
    pairs = [
        pair
        for guess, (_, tags) in zip(guesses, held_out, strict=True)
        for pair in zip(guess, tags, strict=True)
    ]
    share = sum(guess == tag for guess, tag in pairs) / len(pairs)
    name, counted = "most frequent tag of each word", (len(pairs), "held-out words")
    found = [Baseline(name, "eval/accuracy", share, *counted)]
    if is_iob2(prepared.label_names):
        named = prepared.label_names
        scores = entity_scores(
            [[named[tag] for tag in guess] for guess in guesses],
            [[named[tag] for tag in tags] for _, tags in held_out],
        )
        found.append(Baseline(name, "eval/entity_f1", scores["f1"], *counted))
    return found


def _most_frequent(tags: Counter[int]) -> int:
    """The most frequent tag; of several, the one with the lowest index."""
    return min(tags, key=lambda tag: (-tags[tag], tag))


def _sentences(store: TokenStore, tokenizer: Tokenizer) -> Iterator[tuple[list[str], list[int]]]:
    """The words of each sentence, decoded from their tokens, and their tags."""

    @functools.lru_cache(maxsize=1 << 16)
    def written(word: bytes) -> str:
        # Some tokenizers have tokens of their own for the space before a word.
        return tokenizer.decode(np.frombuffer(word, np.int32)).strip()

    start = 0
    for document, stop in enumerate(store.document_ends.tolist()):
        ends = store.sentence_ends_within(start, stop) - start
        words = np.split(store.tokens(start, stop - start), ends[:-1])
        yield [written(word.tobytes()) for word in words], store.labels(document).tolist()
        start = stop
