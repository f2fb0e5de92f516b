"""Which checkpoints are kept when a new one is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Retention:
    """Orbax's preservation policy: the latest steps, every so-many-th, and the best.

    ``unproven`` steps were saved while training steps were being skipped. They take the place of no
    other step: one of them is kept only while it is the newest. ``foreign`` steps and ``links`` are
    never deleted by orbax: the first are not of this run (their meta names another step), and of
    the second it would delete what they point to.
    """

    keep_latest: int
    keep_every: int | None
    keep_best: int
    best_mode: str
    scores: dict[int, float] = field(default_factory=dict)
    """The metric by step; one that is not finite is never among the best."""
    unproven: set[int] = field(default_factory=set)
    foreign: set[int] = field(default_factory=set)
    links: set[int] = field(default_factory=set)

    def kept(self, steps: Collection[int]) -> set[int]:
        """Those of ``steps`` that are kept."""
        own = sorted(set(steps) - self.foreign)
        proven = [step for step in own if step not in self.unproven]
        kept = set(proven[-self.keep_latest :]) | set(own[-1:]) | (set(steps) & self.foreign)
        if self.keep_every is not None:
            kept |= {step for step in proven if step % self.keep_every == 0}
        scored = [step for step in proven if math.isfinite(self.scores.get(step, math.nan))]
        scored.sort(key=lambda step: self.scores[step], reverse=self.best_mode == "max")
        return kept | set(scored[: self.keep_best])

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """What orbax asks; ``checkpoints`` have a ``step``."""
        kept = self.kept([checkpoint.step for checkpoint in checkpoints]) | self.links
        return [checkpoint.step in kept for checkpoint in checkpoints]


def evaluations_since_best(
    evaluations: Sequence[Mapping[str, float]], metric: str, mode: str, min_delta: float = 0.0
) -> int:
    """How many evaluations there were since the last that improved ``metric`` by more than
    ``min_delta``; a score that is not finite is no improvement."""
    best, since = math.inf, 0
    for row in evaluations:
        if metric in row:
            score = row[metric] if mode == "min" else -row[metric]
            improves = math.isfinite(score) and best - score > min_delta
            best, since = (score, 0) if improves else (best, since + 1)
    return since
