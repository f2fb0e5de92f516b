"""Exercises with answers that a program can check: arithmetic, sorting, copying.

They need no data, and are hard enough that a model of a few million parameters learns them step by
step. Everything is drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_COUNT = 4000
_SEED = 0


@dataclass(frozen=True)
class Exercise:
    """A ``question``, the only right ``answer``, and the name of its ``task``."""

    task: str
    question: str
    answer: str

    def is_right(self, text: str) -> bool:
        """Whether a text is the answer, but for whitespace around it."""
        return text.strip() == self.answer


def _add(draw: random.Random) -> Exercise:
    a, b = draw.randrange(0, 50), draw.randrange(0, 50)
    return Exercise("add", f"{a}+{b}=", str(a + b))


def _sort(draw: random.Random) -> Exercise:
    letters = draw.sample(_LETTERS, draw.randrange(2, 6))
    return Exercise("sort", f"sort {''.join(letters)}", "".join(sorted(letters)))


def _copy(draw: random.Random) -> Exercise:
    letters = "".join(draw.choices(_LETTERS, k=draw.randrange(2, 6)))
    return Exercise("copy", f"copy {letters}", letters)


TASKS: dict[str, Callable[[random.Random], Exercise]] = {"add": _add, "sort": _sort, "copy": _copy}
"""What draws an exercise, by the name of its task."""


def exercises(
    count: int, seed: int = _SEED, tasks: tuple[str, ...] = tuple(TASKS)
) -> list[Exercise]:
    """``count`` exercises without repetition, the tasks in turn. Raises ValueError for more than
    there are (2,500 sums)."""
    draw, found = random.Random(seed), dict[str, Exercise]()
    for _ in range(100 * count):
        if len(found) == count:
            return list(found.values())
        one = TASKS[tasks[len(found) % len(tasks)]](draw)
        found.setdefault(one.question, one)
    raise ValueError(f"there are no {count} different exercises of {', '.join(tasks)}")


def wrong_answer(exercise: Exercise, draw: random.Random) -> str:
    """An answer of the same length and kind that is not right."""
    while True:
        letters = list(exercise.answer)
        if exercise.task == "add":
            changed = str(max(0, int(exercise.answer) + draw.choice((-10, -2, -1, 1, 2, 10))))
        else:
            place = draw.randrange(len(letters))
            letters[place] = draw.choice(_LETTERS)
            draw.shuffle(letters)
            changed = "".join(letters)
        if changed != exercise.answer:
            return changed


def embedded_rows(count: int = _COUNT, seed: int = _SEED) -> Iterator[dict[str, Any]]:
    """Exercises as records of preferences: the prompt, the right answer and a wrong one.

    ``completion`` is the right answer too, so that they serve instruction tuning as well."""
    draw = random.Random(seed + 1)
    for one in exercises(count, seed):
        yield {
            "prompt": [{"role": "user", "content": one.question}],
            "completion": [{"role": "assistant", "content": one.answer}],
            "chosen": [{"role": "assistant", "content": one.answer}],
            "rejected": [{"role": "assistant", "content": wrong_answer(one, draw)}],
        }
