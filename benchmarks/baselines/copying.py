"""A baseline of denoising: the target copies the corrupted source.

Like a decoder it reads the source and the target so far. A pointer moves along the source, and the
token at the pointer is predicted next. The prediction is mixed with the source tokens that the
pointer has not passed, and with n-gram probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flax_transformers.objectives.base import Batch

MOST_STEPS = 8
"""Largest number of copied tokens, or of tokens since a [MASK], that is distinguished."""
LOST = 0
"""There is no pointer: it is after the end, or the last token is not in the source."""
COPYING, IN_GAP = 1, 2 + MOST_STEPS
SITUATIONS = 3 + 2 * MOST_STEPS
_ROUNDS = 30  # of expectation maximisation; it converges within ten


@dataclass
class _Pointer:
    """A position in a corrupted source, moved by the tokens of the target."""

    source: list[int]
    mask_id: int
    at: int | None = 0
    steps: int = 0
    """Tokens copied in a row; at a [MASK], tokens written since it was reached."""

    def __post_init__(self) -> None:
        self.passed = [token == self.mask_id for token in self.source]
        self.positions: dict[int, list[int]] = {}
        for position, token in enumerate(self.source):
            self.positions.setdefault(token, []).append(position)
        self.left = len(self.source) - sum(self.passed)

    def look(self) -> tuple[int, int | None]:
        """The situation, and the position in the source of the predicted token."""
        at = self.at
        if at is None:
            return LOST, None
        position = at
        while position < len(self.source) and self.source[position] == self.mask_id:
            position += 1
        if position == len(self.source):
            return LOST, None
        return (IN_GAP if position > at else COPYING) + min(self.steps, MOST_STEPS), position

    def share(self, token: int) -> float:
        """The share of ``token`` among the source tokens that are not passed."""
        if not self.left:
            return 0.0
        return (
            sum(not self.passed[position] for position in self.positions.get(token, ())) / self.left
        )

    def move(self, before: int, token: int, situation: int, proposed: int | None) -> None:
        """Move the pointer after ``token``, which follows ``before`` in the target."""
        if proposed is not None and self.source[proposed] == token:
            self.steps = self.steps + 1 if situation < IN_GAP else 1
            self._pass(proposed)
            return
        unread = [] if token == self.mask_id else self._unread(token)
        pairs = [
            position for position in unread if position and self.source[position - 1] == before
        ]
        if situation >= IN_GAP and not pairs:
            self.steps += 1  # still inside the masked span
            return
        self.steps = 1 if pairs else 0
        if pairs or unread:
            self._pass((pairs or unread)[0])
        else:
            self.at = None

    def _unread(self, token: int) -> list[int]:
        return [position for position in self.positions.get(token, ()) if not self.passed[position]]

    def _pass(self, position: int) -> None:
        if not self.passed[position]:
            self.passed[position] = True
            self.left -= 1
        self.at = position + 1
        if self.at < len(self.source) and self.source[self.at] == self.mask_id:
            self.steps = 0


def followed(
    source: np.ndarray, target: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three arrays [n] for ``target`` int [n] and its corrupted ``source`` int [m].

    For each token the situation, int64; whether it is the predicted one, float64; and its share of
    the remaining source tokens, float64. They depend on the source, the tokens before, and the
    token itself.
    """
    pointer = _Pointer(source.tolist(), mask_id)
    rows: list[tuple[int, float, float]] = []
    before = -1
    for token in target.tolist():
        situation, proposed = pointer.look()
        right = proposed is not None and pointer.source[proposed] == token
        rows.append((situation, float(right), pointer.share(token)))
        pointer.move(before, token, situation, proposed)
        before = token
    situations, right, share = np.array(rows, np.float64).reshape(-1, 3).T
    return situations.astype(np.int64), right, share


def copied(batch: Batch, mask_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`followed` for all labels of a batch of encoder-decoder rows, concatenated."""
    found = []
    for row in range(len(batch["input_ids"])):
        read, written = batch["attention_mask"][row] > 0, batch["weights"][row] > 0
        source, target = batch["input_ids"][row][read], batch["labels"][row][written]
        found.append(followed(source, target, mask_id))
    situations, right, share = zip(*found, strict=True)
    return np.concatenate(situations), np.concatenate(right), np.concatenate(share)


def mixture_weights(situations: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Maximum-likelihood weights of K guesses in each situation: [situations, K].

    ``situations`` int64 [n], ``chances`` float64 [n, K] the probability of the token under each
    guess. Each count is smoothed by one token, for rare situations.
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
