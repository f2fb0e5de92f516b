"""Rewards of completions: verifiers, functions of the user's, and reward models.

A reward scores completions as text. It is a frozen dataclass, so that a config can hold it; a
subclass of `Reward` defined by the user is one as well.
"""

from __future__ import annotations

import ast
import concurrent.futures
import importlib
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

from flax_transformers import ranges
from flax_transformers.data.sources.documents import LARGEST_NUMBER
from flax_transformers.errors import UserError
from flax_transformers.parallel.distributed import wait_for_all
from flax_transformers.parallel.watchdog import watchdog

_WAIT_SECONDS = 10.0

Rows = Sequence[Mapping[str, Any]]
"""The row of the data of each completion: "prompt", "answer", and further fields if any."""

Texts = Sequence[str]

Scorer = Callable[[Texts, Texts, Rows], Sequence[float]]
"""``(prompts, completions, rows) -> rewards``, one number for each completion."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Base of rewards; a subclass defines ``score``, or ``scorer`` if it has to load something."""

    weight: float = 1.0
    """Factor in the sum of several rewards."""
    time_limit_s: float = 60.0
    """Seconds in which the completions of one rollout must be scored; 0: no limit."""

    on_all_processes: ClassVar[bool] = False
    """Whether each process of a job computes it, with its devices; else the first one alone."""
    RANGES: ClassVar[ranges.Ranges] = {
        "weight": ranges.numbers(-1e6, 1e6),
        "time_limit_s": ranges.SECONDS,
        "tolerance": ranges.COEFFICIENT,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective.rollouts.rewards")

    @property
    def name(self) -> str:
        """The name of its metric: of the class, in lower case with underscores."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def score(self, prompts: Texts, completions: Texts, rows: Rows) -> Sequence[float]:
        """One number for each completion."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def scorer(self, mesh: Mesh) -> Scorer:
        """What scores completions, after loading what that needs."""
        return self.score


@dataclass(frozen=True, kw_only=True)
class ExactAnswer(Reward):
    """1 if the completion is the answer, without surrounding whitespace; else 0."""

    def score(self, prompts: Texts, completions: Texts, rows: Rows) -> Sequence[float]:
        pairs = zip(completions, rows, strict=True)
        return [float(text.strip() == str(row["answer"]).strip()) for text, row in pairs]


# A sign behind a digit or a word, as in "3-5", is an operator or a hyphen.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class NumericAnswer(Reward):
    """1 if the last number of the completion is that of the answer; else 0.

    Commas between digits are left out. Numbers may differ by ``tolerance``, relative to the answer.
    """

    tolerance: float = 1e-6

    def score(self, prompts: Texts, completions: Texts, rows: Rows) -> Sequence[float]:
        pairs = zip(completions, rows, strict=True)
        return [float(self._is_right(text, str(row["answer"]))) for text, row in pairs]

    def _is_right(self, completion: str, answer: str) -> bool:
        found, expected = _last_number(completion), _last_number(answer)
        if found is None or expected is None:
            return False
        return abs(found - expected) <= self.tolerance * abs(expected)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True, kw_only=True)
class MatchesPattern(Reward):
    """1 if a regular expression matches the whole completion; else 0."""

    pattern: str
    """In the syntax of Python's ``re``; the full stop also matches line ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ranges.OutOfRange(
                f"objective.rollouts.rewards: the pattern {self.pattern!r} is no regular "
                f"expression ({error}); correct it"
            ) from error

    def score(self, prompts: Texts, completions: Texts, rows: Rows) -> Sequence[float]:
        job = json.dumps([self.pattern, list(completions)])
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _MATCH],
                input=job, capture_output=True, text=True, check=True,
                timeout=self.time_limit_s or None,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise _too_slow(self) from None
        return [float(value) for value in json.loads(done.stdout)]


_MATCH = """
import json, re, sys
pattern, texts = json.load(sys.stdin)
matches = re.compile(pattern, re.DOTALL).fullmatch
json.dump([matches(text) is not None for text in texts], sys.stdout)
"""
"""Run in a process of its own: Python's ``re`` holds the interpreter for as long as a search takes,
which grows exponentially for some patterns, and a thread cannot be ended."""

_functions: dict[str, Scorer] = {}
"""Functions that were given as objects, by name."""


@dataclass(frozen=True, kw_only=True)
class FunctionReward(Reward):
    """A function of the user's: ``(prompts, completions, rows) -> list of numbers``."""

    function: Any
    """The function, or its name "module:function". A function becomes its name. A name, which can
    come from a checkpoint, means a function that the config file or program has given as an object,
    or one that a file of the current folder defines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.function):
            name = f"{self.function.__module__}:{self.function.__qualname__}"
            if "<" in name:
                raise ranges.OutOfRange(
                    f"the reward function {name} has no name by which a run that resumes finds it; "
                    "define it at the top of a module"
                )
            _functions[name] = self.function
            object.__setattr__(self, "function", name)
        if not isinstance(self.function, str) or not all(self.function.partition(":")):
            raise ranges.OutOfRange(
                f"a reward function is {ranges.shown(self.function)}; give a function, or its name "
                "as in my_rewards:score"
            )

    @property
    def name(self) -> str:
        return str(self.function).rpartition(":")[2].rpartition(".")[2]

    def scorer(self, mesh: Mesh) -> Scorer:
        """The function. Raises UserError if there is none of that name."""
        name = str(self.function)
        return _functions[name] if name in _functions else _function_named(name)


def _function_named(name: str) -> Scorer:
    module, _, attribute = name.partition(":")
    file = Path(*module.split(".")).with_suffix(".py")
    if module not in sys.modules and _defines_function(file, attribute):
        sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(module)
        except Exception as error:
            raise UserError(
                f"{file}, which defines the reward function {attribute}, fails with "
                f"{type(error).__name__}: {error}; correct the file"
            ) from error
        finally:
            sys.path.pop(0)
    loaded = sys.modules.get(module)
    place = getattr(loaded, "__file__", None)
    found = getattr(loaded, attribute, None)
    if not (callable(found) and place and Path(place).resolve() == file.resolve()):
        raise UserError(
            f"there is no reward function {name}: no config file or program has given it, and "
            f"{file} in the current folder does not define it; give the function itself in the "
            "config file"
        )
    return found


def _defines_function(file: Path, name: str) -> bool:
    """Whether a file has a top-level function of that name. Does not run the file."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in body)


def checked_scores(
    reward: Reward, scorer: Scorer, prompts: Texts, completions: Texts, rows: Rows
) -> list[float]:
    """The checked result of ``scorer``, which is that of ``reward``.

    Raises UserError, in one sentence, for an exception, the end of the time limit, another number
    of results than completions, and a result that is not a finite number.
    """
    found = _within(reward, lambda: scorer(prompts, completions, rows))
    try:
        values = list(found)
    except TypeError:
        raise UserError(
            f"the reward {reward.name} returned {ranges.shown(found)}; it must return one number "
            "for each completion"
        ) from None
    if len(values) != len(completions):
        raise UserError(
            f"the reward {reward.name} returned {len(values)} numbers for {len(completions)} "
            "completions; it must return one for each"
        )
    for value, completion in zip(values, completions, strict=True):
        if not _is_finite(value):
            raise UserError(
                f"the reward {reward.name} gives {value!r} to the completion "
                f"{ranges.shown(completion[:80])}; it must be a finite number that float32 holds"
            )
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    try:
        return abs(value) <= LARGEST_NUMBER
    except (TypeError, ValueError):
        return False


def _within(reward: Reward, call: Callable[[], Any]) -> Any:
    """The result of ``call`` within the reward's time limit, which holds in place of that of the
    phase; without one, that of the phase does.

    A call that hangs continues in its thread, which ends with the process.
    """
    future = _begun(reward, call)
    end = time.monotonic() + (reward.time_limit_s or math.inf)
    while not future.done():
        left = end - time.monotonic()
        if left <= 0:
            raise _too_slow(reward)
        if reward.time_limit_s:
            watchdog.progress()
        concurrent.futures.wait([future], min(left, _WAIT_SECONDS))
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, UserError):
        raise error
    raise UserError(
        f"the reward {reward.name} fails with {type(error).__name__}: "
        f"{' '.join(str(error).split())}; correct it"
    ) from error


def _begun(reward: Reward, call: Callable[[], Any]) -> Future[Any]:
    """The result of ``call``, which runs in a thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"reward {reward.name}", daemon=True).start()
    return future


def wait_for_scores(reward: Reward) -> None:
    """Waits until all processes of a job have scored, as long as the reward may take.

    A collective of devices has a limit of its own, which can be shorter.
    """
    future = _begun(reward, wait_for_all)
    while not future.done():
        if reward.time_limit_s:  # the process that scores observes it
            watchdog.progress()
        concurrent.futures.wait([future], _WAIT_SECONDS)
    future.result()


def _too_slow(reward: Reward) -> UserError:
    return UserError(
        f"the reward {reward.name} did not return within {reward.time_limit_s:g} s; make it "
        "faster, or raise its time_limit_s"
    )


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """The names of the metrics of several rewards; those of one name are numbered."""
    names = [reward.name for reward in rewards]
    return [
        f"{name}_{names[:place].count(name) + 1}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]
