"""Baselines of translation: the source itself, and a word-by-word dictionary (IBM model 1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.translation import MAX_SCORED, decode_target, pairs_of, scores
from flax_transformers.training.config import TrainConfig

MAX_FITTED = 20_000
"""Largest number of training pairs that the word lookup is fitted on."""


def translation_baselines(config: TrainConfig, prepared: PreparedText) -> list[Baseline]:
    """BLEU and chrF on the held-out pairs.

    - "copying": the source, unchanged.
    - "word lookup": each word of the source replaced by its most likely translation, in the order
      of the source; see `word_lookup`. Words that are not in the training pairs stay unchanged.
    """
    decodes = prepared.tokenizer.decode, decode_target(prepared)
    held_out = pairs_of(config, prepared, "validation", MAX_SCORED)
    if not held_out:
        return []
    sources, references = (
        list(map(decode, sides))
        for decode, sides in zip(decodes, zip(*held_out, strict=True), strict=True)
    )
    known = pairs_of(config, prepared, "train", MAX_FITTED)
    lookup = word_lookup((decodes[0](a).split(), decodes[1](b).split()) for a, b in known)
    looked_up = [" ".join(lookup.get(word, word) for word in text.split()) for text in sources]
    return [
        Baseline(name, f"eval/{metric}", score, len(sources), "held-out pairs")
        for name, guesses in (("copying", sources), ("word lookup", looked_up))
        for metric, score in scores(guesses, references).items()
    ]


def word_lookup(
    pairs: Iterable[tuple[Sequence[str], Sequence[str]]], rounds: int = 5
) -> dict[str, str]:
    """The most likely translation of each source word by IBM model 1 (Brown et al., 1993).

    Every target word is the translation of one word of its source. The probabilities are fitted by
    expectation maximisation, starting from the uniform distribution.
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
