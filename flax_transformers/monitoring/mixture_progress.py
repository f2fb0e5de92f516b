"""How much of each component of a mixture a run has trained on, from its position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax_transformers.data.dataset import Dataset
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.objectives.base import Objective


@dataclass(frozen=True)
class ComponentProgress:
    """What was read of a component: examples, epochs of its text, and tokens."""

    examples: int = 0
    epochs: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: ComponentProgress) -> ComponentProgress:
        return ComponentProgress(
            self.examples + other.examples,
            self.epochs + other.epochs,
            self.tokens + other.tokens,
        )


class MixtureProgress:
    """Counts what was read of each component since the start of a run; nothing for other data.

    ``phases``: those of the run's config; ``phase``: the index of the present one.
    """

    def __init__(
        self, objective: Objective, phases: Sequence[Any], prepared: Dataset, phase: int
    ) -> None:
        self._objective, self._phases, self._prepared = objective, phases, prepared
        self._examples = self._examples_of(phase)
        self._before: dict[str, ComponentProgress] = {}
        for number, over in enumerate(phases[:phase]):
            taken = self._taken(self._examples_of(number), over.steps * over.batch_size)
            self._before = _added(self._before, taken)

    def row(self, position: int) -> dict[str, float]:
        """Metrics at a position of the phase, in examples of all: "train/examples_NAME" ..."""
        found = _added(self._before, self._taken(self._examples, position))
        return {
            f"train/{what}_{name}": count
            for name, taken in found.items()
            for what, count in vars(taken).items()
        }

    def _examples_of(self, phase: int) -> Examples | None:
        if len(self._prepared.components) == 1 and self._prepared.components[0][0] == "":
            return None
        spec = self._objective.window_spec(self._phases[phase].sequence_length)
        return self._prepared.examples("train", spec)

    def _taken(self, examples: Examples | None, position: int) -> dict[str, ComponentProgress]:
        if examples is None:
            return {}
        parts, sizes = dict(self._prepared.components), dict(examples.components)
        found = {}
        for name, count in examples.consumed(position).items():
            epochs = count / len(sizes[name])
            found[name] = ComponentProgress(count, epochs, epochs * parts[name].num_tokens)
        return found


def _added(
    one: dict[str, ComponentProgress], other: dict[str, ComponentProgress]
) -> dict[str, ComponentProgress]:
    return {
        name: one.get(name, ComponentProgress()) + other.get(name, ComponentProgress())
        for name in one | other
    }
