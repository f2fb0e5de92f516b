"""Scores of tagged words, and the guess that they have to beat."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_transformers.data.pipeline.labelled_examples import LabelledExamples
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.predictions import held_out_predictions
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot

Entity = tuple[str, int, int]
"""A kind, and the numbers of its first word and of the one behind its last."""


def entity_evaluator(config: TrainConfig, prepared: PreparedText) -> Evaluator:
    """``{"eval/entity_f1", "eval/entity_precision", "eval/entity_recall"}`` of IOB2 tags, over
    all held-out sentences together. Other tags have no entities, and get none of these.
    """
    names = prepared.label_names
    if not is_iob2(names):
        return lambda _: {}
    predictions = held_out_predictions(config, prepared)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        spec = config.objective.window_spec(snapshot.phase.sequence_length)
        examples = prepared.examples("validation", spec)
        assert isinstance(examples, LabelledExamples)  # as the objective tags words
        guessed: dict[int, list[str]] = defaultdict(list)
        true: dict[int, list[str]] = defaultdict(list)
        for batch in predictions(snapshot):
            for row, number in enumerate(batch["example_id"].tolist()):
                document = examples.document_of(number)  # a long sentence has several rows
                words = batch["weights"][row] > 0
                for tags, values in ((guessed, batch["predicted"]), (true, batch["labels"])):
                    tags[document] += [names[tag] for tag in values[row][words].tolist()]
        return {
            f"eval/entity_{name}": score
            for name, score in entity_scores(guessed.values(), true.values()).items()
        }

    return evaluate


def is_iob2(names: Sequence[str]) -> bool:
    """Whether tags are "O" and others that begin with "B-" or "I-"."""
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, as conlleval and seqeval (in its default mode) read them.

    One begins at "B-", and at an "I-" that follows no tag of its kind.
    """
    found: list[Entity] = []
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        continues = tag == f"I-{kind}" and kind != ""
        if continues:
            continue
        if kind:
            found.append((kind, start, place))
        kind, start = tag[2:], place
    return found


def entity_scores(
    guessed: Iterable[Sequence[str]], true: Iterable[Sequence[str]]
) -> dict[str, float]:
    """``f1``, ``precision`` and ``recall`` of the entities of all sentences; 0 where there are
    none."""
    right = found = wanted = 0
    for guess, truth in zip(guessed, true, strict=True):
        ours, theirs = set(entities(guess)), set(entities(truth))
        right, found, wanted = right + len(ours & theirs), found + len(ours), wanted + len(theirs)
    return {
        "f1": 2 * right / max(1, found + wanted),
        "precision": right / max(1, found),
        "recall": right / max(1, wanted),
    }


def tagging_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """What each word's most frequent tag scores: of words that training never had, that of all.

    Words are the same that read the same, wherever they stand in a sentence. Of IOB2 tags also the
    F1 of entities.
    """
    if not isinstance(config.objective, TokenClassification) or prepared.validation is None:
        return []
    if prepared.train.label_kind != "tags":  # refused when the run begins
        return []
    if config.evaluation.max_examples is not None:  # the model is scored on a part of these
        return []
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
    """Of equally frequent ones the first by number."""
    return min(tags, key=lambda tag: (-tags[tag], tag))


def _sentences(store: TokenStore, tokenizer: Tokenizer) -> Iterator[tuple[list[str], list[int]]]:
    """The words of each sentence, as their tokens read, and their tags."""

    @functools.lru_cache(maxsize=1 << 16)
    def written(word: bytes) -> str:
        # A space before it, which some tokenizers give tokens of its own, is no part of a word.
        return tokenizer.decode(np.frombuffer(word, np.int32)).strip()

    start = 0
    for document, stop in enumerate(store.document_ends.tolist()):
        ends = store.sentence_ends_within(start, stop) - start
        words = np.split(store.tokens(start, stop - start), ends[:-1])
        yield [written(word.tobytes()) for word in words], store.labels(document).tolist()
        start = stop
