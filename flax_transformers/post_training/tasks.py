"""Generated preferences: problems with a right and a wrong answer, as records of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from flax_transformers.post_training.problems import Task, generated

_COUNT = 4000
_DIGITS = (1, 5)  # fewest and most


def embedded_rows(count: int = _COUNT) -> Iterator[dict[str, Any]]:
    """Problems of all tasks in turn: the prompt, the right answer and a wrong one.

    ``completion`` is the right answer too, so that they serve instruction tuning as well. No prompt
    is there twice.
    """
    seen: set[str] = set()
    tasks = get_args(Task)
    for number in range(100 * count):
        if len(seen) == count:
            return
        random = np.random.default_rng([number, count])
        digits = int(random.integers(_DIGITS[0], _DIGITS[1] + 1))
        prompt, right = generated(tasks[number % len(tasks)], digits, random)
        if prompt in seen:
            continue
        seen.add(prompt)
        answer = [{"role": "assistant", "content": right}]
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": answer,
            "chosen": answer,
            "rejected": [{"role": "assistant", "content": wrong_answer(right, random)}],
        }


def wrong_answer(right: str, random: np.random.Generator) -> str:
    """A number of as many digits that differs from the right one: one digit is changed, or the
    order of digits."""
    while True:
        digits = list(right)
        if random.random() < 0.5:
            digits[random.integers(len(digits))] = str(random.integers(10))
        else:
            random.shuffle(digits)
        if (changed := "".join(digits)) != right:
            return changed
