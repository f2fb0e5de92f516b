"""Problems that a program generates and checks: data for recipes that need no files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.dataset import PythonData, SequenceDataset
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError

_ATTEMPTS = 1000
_INT64_DIGITS = 18

Task = Literal["addition", "sorting", "copying"]


@dataclass(frozen=True, kw_only=True)
class Problems(PythonData):
    """Generated problems, such as "sort 52190=" with the answer "01259", over bytes.

    No training problem is held out. A problem depends on its number alone: of two runs, the one
    with more problems has those of the other, and further ones.
    """

    task: Task = "sorting"
    """"addition" of two numbers, "sorting" or "copying" of a string, of digits."""
    digits: int = 5
    """Digits of a number, or of the string."""
    training: int = 20_000
    """Number of training problems."""
    held_out: int = 256
    """Number of held-out problems."""
    form: Literal["texts", "prompts"] = "prompts"
    """Texts of problem and answer, for language modelling, or prompts with answers."""

    RANGES: ClassVar[ranges.Ranges] = {
        "digits": ranges.integers(1, 64),
        "training": ranges.integers(),
        "held_out": ranges.integers(),
    }

    def load(self) -> SequenceDataset:
        train, held_out = self.items()
        name = f"{self.task} of {self.digits} digits as {self.form}"
        return SequenceDataset(train, held_out, tokenizer=_tokenizer(), name=name)

    def items(self) -> tuple[ProblemSequence, ProblemSequence]:
        """The training problems and those held out."""
        held_out = ProblemSequence(self.task, self.digits, self.form, -self.held_out, self.held_out)
        prompts = frozenset(held_out.problem(number)[0] for number in range(self.held_out))
        train = ProblemSequence(
            self.task, self.digits, self.form, 0, self.training, without=prompts
        )
        return train, held_out


@functools.cache
def _tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@dataclass(frozen=True)
class ProblemSequence(Sequence[Any]):
    """``size`` problems from number ``first`` on, none with a prompt in ``without``."""

    task: Task
    digits: int
    form: Literal["texts", "prompts"]
    first: int
    size: int
    without: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        prompt, answer = self.problem(index)
        if self.form == "texts":
            return prompt + answer
        source, target = _tokenizer().encode_batch([prompt, answer])
        return {
            "source_tokens": source,
            "source_ends": np.array([len(source)], np.int32),
            "target_tokens": target,
            "target_ends": np.array([len(target)], np.int32),
        }

    def problem(self, index: int) -> tuple[str, str]:
        """Prompt and answer. Raises UserError if nearly all problems are held out."""
        random = np.random.default_rng([self.first + index + 2**31, self.digits])
        for _ in range(_ATTEMPTS):
            prompt, answer = generated(self.task, self.digits, random)
            if prompt not in self.without:
                return prompt, answer
        raise UserError(
            f"data.held_out {len(self.without)} are nearly all problems of data.digits "
            f"{self.digits}; hold out fewer, or take more digits"
        )


def generated(task: Task, digits: int, random: np.random.Generator) -> tuple[str, str]:
    """A random problem and its answer."""
    if task == "addition":
        if digits <= _INT64_DIGITS:
            a, b = (int(number) for number in random.integers(0, 10**digits, 2))
        else:
            a, b = (int("".join(map(str, random.integers(0, 10, digits)))) for _ in range(2))
        return f"{a}+{b}=", str(a + b)
    text = "".join(map(str, random.integers(0, 10, digits)))
    if task == "sorting":
        return f"sort {text}=", "".join(sorted(text))
    return f"copy {text}=", text
