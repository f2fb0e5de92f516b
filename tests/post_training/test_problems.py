"""Generated problems."""

from __future__ import annotations

import pytest

from flax_transformers.errors import UserError
from flax_transformers.post_training.problems import ProblemSequence


def test_no_training_problem_is_held_out_and_a_loop_over_all_ends():
    items = ProblemSequence(
        "sorting", 2, "prompts", 0, 30, without=frozenset({"sort 12=", "sort 21="})
    )
    assert len(list(items)) == 30
    assert not {items.problem(number)[0] for number in range(30)} & items.without


def test_too_many_held_out_problems_are_refused():
    every = frozenset(f"sort {digit}=" for digit in range(10))
    with pytest.raises(
        UserError, match="data.held_out 10 are nearly all problems of data.digits 1"
    ):
        ProblemSequence("sorting", 1, "prompts", 0, 5, without=every)[0]


def test_numbers_can_be_longer_than_an_integer_of_a_machine():
    prompt, answer = ProblemSequence("addition", 40, "prompts", 0, 5).problem(3)
    a, b = map(int, prompt.removesuffix("=").split("+"))
    assert int(answer) == a + b > 10**30
