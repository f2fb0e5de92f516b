"""Translations of held-out pairs: their scores, and the guesses that they have to beat.

BLEU (Papineni et al., 2002) and chrF (Popović, 2015) are sacrebleu's, of whole corpora, in points
of a hundred. Texts are what the tokenizers give back of what is in the store.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.generation.translate import generate_target
from flax_transformers.objectives.rows import end_id, start_id
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.loop import Evaluator, Snapshot

MOST_SCORED, MOST_FITTED = 2_000, 20_000
"""Held-out pairs that are translated, and training pairs that the word lookup is made from."""
_ROWS_AT_ONCE = 64

Pair = tuple[np.ndarray, np.ndarray]
"""The ids of a source and of its target, int32 [n] and [m]."""


def can_score() -> bool:
    """Whether sacrebleu is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


def scores(guesses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``{"bleu": ..., "chrf": ...}``. Raises UserError where sacrebleu is not installed."""
    if not can_score():
        raise UserError("BLEU and chrF need sacrebleu; pip install 'flax_transformers[evaluation]'")
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(list(guesses), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(guesses), [list(references)]).score,
    }


def pairs_of(config: TrainConfig, prepared: PreparedText, split: Split, most: int) -> list[Pair]:
    """The first pairs of a split, cut to rows; none where nothing is held out."""
    spec = config.objective.window_spec(config.phases[-1].sequence_length)
    examples = prepared.examples(split, dataclasses.replace(spec, cross_documents=False))
    if examples is None:
        return []
    rng = np.random.default_rng(0)  # nothing in a pair is random
    rows = (examples.read(number, rng) for number in range(min(most, len(examples))))
    return [(row["source_tokens"], row["target_tokens"]) for row in rows]


def translation_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """What two guesses score on the held-out pairs; none without pairs or sacrebleu.

    - "copying": the source as it is.
    - "word lookup": each word of the source by the word that most likely stands for it, in the
      source's order; see `word_lookup`. A word that training never had stays as it is.
    """
    if not isinstance(config.objective, SequenceToSequence) or not can_score():
        return []
    decodes = prepared.tokenizer.decode, _decode_target(prepared)
    held_out = pairs_of(config, prepared, "validation", MOST_SCORED)
    if not held_out:
        return []
    sources, references = (
        list(map(decode, sides))
        for decode, sides in zip(decodes, zip(*held_out, strict=True), strict=True)
    )
    known = pairs_of(config, prepared, "train", MOST_FITTED)
    lookup = word_lookup((decodes[0](a).split(), decodes[1](b).split()) for a, b in known)
    looked_up = [" ".join(lookup.get(word, word) for word in text.split()) for text in sources]
    return [
        Baseline(name, f"eval/{metric}", score, len(sources), "held-out pairs")
        for name, guesses in (("copying", sources), ("word lookup", looked_up))
        for metric, score in scores(guesses, references).items()
    ]


def _decode_target(prepared: PreparedText) -> Callable[[Iterable[int]], str]:
    """What makes text of the ids of a target."""
    return (prepared.target_tokenizer or prepared.tokenizer).decode


def word_lookup(
    pairs: Iterable[tuple[Sequence[str], Sequence[str]]], rounds: int = 5
) -> dict[str, str]:
    """The likeliest translation of each source word, by IBM model 1 (Brown et al., 1993).

    Every word of a target is the translation of one word of its source, whichever; how likely each
    is to be is found by expectation maximisation from an even guess.
    """
    known = list(pairs)
    likely: dict[str, dict[str, float]] = {}
    for source, target in known:
        for word in source:
            likely.setdefault(word, {}).update(dict.fromkeys(target, 1.0))
    for _ in range(rounds):
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for source, target in known:
            for word in target:
                total = sum(likely[one][word] for one in source)
                for one in source:
                    found[one][word] += likely[one][word] / total
        likely = {
            one: {word: share / sum(words.values()) for word, share in words.items()}
            for one, words in found.items()
        }
    return {one: max(words, key=words.__getitem__) for one, words in likely.items()}


def translate(
    config: TrainConfig, prepared: PreparedText, model: nn.Module, params: Any, pairs: list[Pair]
) -> Iterator[np.ndarray]:
    """What the model writes for the sources of ``pairs``, greedily: int32 ids without the end."""
    objective, vocabulary = _objective(config), prepared.vocabulary
    length = config.phases[-1].sequence_length
    target = vocabulary.of_targets
    end, start = end_id(target), [objective.first_id(target)]
    begin, target_begin = (
        [start_id(side)] if objective.begin else [] for side in (vocabulary, target)
    )
    for number in range(0, len(pairs), _ROWS_AT_ONCE):
        some = pairs[number : number + _ROWS_AT_ONCE]
        ids = np.full((_ROWS_AT_ONCE, length), vocabulary.pad_id, np.int32)
        mask = np.zeros_like(ids)
        mask[:, 0] = 1  # rows that fill the last batch up have to have a token
        for row, (source, _) in enumerate(some):
            text = np.concatenate([begin, source, [end_id(vocabulary)]]).astype(np.int32)
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        written = generate_target(
            model,
            params,
            ids,
            mask,
            max_new_tokens=objective.predictions(length) - len(start),
            start_ids=start,
            eos_id=end,
            pad_id=target.pad_id,
        )
        for row in jax.device_get(written)[: len(some)]:
            ends = np.flatnonzero(row == end)
            kept = row[: ends[0]] if len(ends) else row
            yield kept[kept != target_begin[0]] if target_begin else kept


def _objective(config: TrainConfig) -> SequenceToSequence:
    """The objective of a config that is known to train on pairs."""
    if not isinstance(config.objective, SequenceToSequence):
        raise TypeError(f"{type(config.objective).__name__} has no pairs to translate")
    return config.objective


def translation_evaluator(
    config: TrainConfig, prepared: PreparedText, model: nn.Module, at_step: int | None = None
) -> Evaluator:
    """``{"eval/bleu": ..., "eval/chrf": ...}`` of the first held-out pairs, translated greedily.

    ``at_step``: after this step alone, as it takes a while; None: whenever it is asked.
    """
    held_out = pairs_of(config, prepared, "validation", MOST_SCORED)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        if not held_out or at_step not in (None, snapshot.step):
            return {}
        decode = _decode_target(prepared)
        texts = map(decode, translate(config, prepared, model, snapshot.params, held_out))
        found = scores(list(texts), [decode(target) for _, target in held_out])
        return {f"eval/{name}": score for name, score in found.items()}

    return evaluate
