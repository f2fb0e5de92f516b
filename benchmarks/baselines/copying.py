"""What has to be beaten where a text is written from a damaged copy of it: copying that copy.

The guess reads the source and what has been written so far, as a decoder does, and keeps a finger
on the source: the token under it is what it proposes to write next. Each proposal is mixed with
any token of the source that the finger has not passed yet, and with what is common in the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flax_transformers.objectives.base import Batch

MOST_STEPS = 8
"""Tokens copied in a row, or written since a [MASK], are told apart up to so many."""
LOST = 0
"""The finger is nowhere: behind the end of the source, or at a token that the source lacks."""
COPYING, IN_GAP = 1, 2 + MOST_STEPS
SITUATIONS = 3 + 2 * MOST_STEPS
_ROUNDS = 30  # of expectation and maximisation; the weights settle within ten


@dataclass
class _Finger:
    """A place in a damaged text, moved by what is written."""

    source: list[int]
    mask_id: int
    at: int | None = 0
    steps: int = 0
    """Tokens copied in a row; at a [MASK], tokens written since it was reached."""

    def __post_init__(self) -> None:
        self.passed = [token == self.mask_id for token in self.source]
        self.places: dict[int, list[int]] = {}
        for place, token in enumerate(self.source):
            self.places.setdefault(token, []).append(place)
        self.left = len(self.source) - sum(self.passed)

    def look(self) -> tuple[int, int | None]:
        """The situation, and the place in the source that is proposed."""
        at = self.at
        if at is None:
            return LOST, None
        place = at
        while place < len(self.source) and self.source[place] == self.mask_id:
            place += 1
        if place == len(self.source):
            return LOST, None
        return (IN_GAP if place > at else COPYING) + min(self.steps, MOST_STEPS), place

    def share(self, token: int) -> float:
        """Of the source's tokens that are not passed, how many are ``token``."""
        if not self.left:
            return 0.0
        return sum(not self.passed[place] for place in self.places.get(token, ())) / self.left

    def move(self, before: int, token: int, situation: int, proposed: int | None) -> None:
        """Goes on behind ``token``, which was written after ``before``."""
        if proposed is not None and self.source[proposed] == token:
            self.steps = self.steps + 1 if situation < IN_GAP else 1
            self._pass(proposed)
            return
        unread = [] if token == self.mask_id else self._unread(token)
        pairs = [place for place in unread if place and self.source[place - 1] == before]
        if situation >= IN_GAP and not pairs:
            self.steps += 1  # still what the [MASK] hides
            return
        self.steps = 1 if pairs else 0
        if pairs or unread:
            self._pass((pairs or unread)[0])
        else:
            self.at = None

    def _unread(self, token: int) -> list[int]:
        return [place for place in self.places.get(token, ()) if not self.passed[place]]

    def _pass(self, place: int) -> None:
        if not self.passed[place]:
            self.passed[place] = True
            self.left -= 1
        self.at = place + 1
        if self.at < len(self.source) and self.source[self.at] == self.mask_id:
            self.steps = 0


def followed(
    source: np.ndarray, target: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three arrays [n] for ``target`` int [n], the text of which ``source`` int [m] is a copy.

    The situation at each token, int64; whether the token is the proposed one, float64; and which
    share of what is left of the source is that token, float64. They depend on the source and on
    the tokens before alone, but for the token that is asked about.
    """
    finger = _Finger(source.tolist(), mask_id)
    rows: list[tuple[int, float, float]] = []
    before = -1
    for token in target.tolist():
        situation, proposed = finger.look()
        right = proposed is not None and finger.source[proposed] == token
        rows.append((situation, float(right), finger.share(token)))
        finger.move(before, token, situation, proposed)
        before = token
    situations, right, share = np.array(rows, np.float64).reshape(-1, 3).T
    return situations.astype(np.int64), right, share


def copied(batch: Batch, mask_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`followed` for all labels of a batch of encoder-decoder rows, one after the other."""
    found = []
    for row in range(len(batch["input_ids"])):
        read, written = batch["attention_mask"][row] > 0, batch["weights"][row] > 0
        source, target = batch["input_ids"][row][read], batch["labels"][row][written]
        found.append(followed(source, target, mask_id))
    situations, right, share = zip(*found, strict=True)
    return np.concatenate(situations), np.concatenate(right), np.concatenate(share)


def mixture_weights(situations: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """The weights of K guesses in each situation that make the tokens likeliest: [situations, K].

    ``situations`` int64 [n], ``chances`` float64 [n, K] what each guess gives the token. One token
    is added to each weight, for situations that were hardly seen.
    """
    kinds = chances.shape[1]
    weights = np.full((SITUATIONS, kinds), 1 / kinds)
    for _ in range(_ROUNDS):
        parts = weights[situations] * chances
        parts /= parts.sum(axis=1, keepdims=True)
        sums = [np.bincount(situations, part, minlength=SITUATIONS) + 1 for part in parts.T]
        weights = np.stack(sums, axis=1) / np.sum(sums, axis=0)[:, None]
    return weights


def mixed_cross_entropy(situations: np.ndarray, chances: np.ndarray, weights: np.ndarray) -> float:
    """Nats per token of guesses mixed with the ``weights`` of `mixture_weights`."""
    return float(-np.log((weights[situations] * chances).sum(axis=1)).mean())
