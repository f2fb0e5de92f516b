"""ROUGE of generated texts (Lin, 2004), as the package rouge-score computes it without stemming.

Words are runs of the letters a to z, in lower case, and digits: text in other scripts has none and
scores 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[a-z0-9]+")


def rouge_scores(guesses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``{"rouge1", "rouge2", "rougeL"}``: mean F1 of words, of pairs of words, and of the longest
    common subsequence, from 0 to 100."""
    pairs = [
        (_WORD.findall(reference.lower()), _WORD.findall(guess.lower()))
        for guess, reference in zip(guesses, references, strict=True)
    ]
    found = {
        "rouge1": [_of_ngrams(*pair, 1) for pair in pairs],
        "rouge2": [_of_ngrams(*pair, 2) for pair in pairs],
        "rougeL": [_f1(common_subsequence(*pair), *map(len, pair)) for pair in pairs],
    }
    return {name: 100.0 * float(np.mean(values)) for name, values in found.items()}


def _of_ngrams(reference: Sequence[str], guess: Sequence[str], size: int) -> float:
    of_reference, of_guess = (
        Counter(zip(*(words[start:] for start in range(size)), strict=False))
        for words in (reference, guess)
    )
    common = (of_reference & of_guess).total()
    return _f1(common, of_reference.total(), of_guess.total())


def _f1(common: int, of_reference: int, of_guess: int) -> float:
    return 2 * common / (of_reference + of_guess) if common else 0.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, candidate in enumerate(other, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == candidate else max(above, row[place - 1])
            diagonal = above
    return row[-1]
