"""The steps compiled for TPUs stay within their budgets, and a figure above one is reported."""

import jax
import pytest

from benchmarks import budgets


def test_a_figure_more_than_two_percent_above_its_budget_is_named():
    budget = budgets.read()["steps"]["gpt2_small"]
    assert budgets.excesses("gpt2_small", budget) == []
    within = {key: value * 1.019 for key, value in budget.items()}
    assert budgets.excesses("gpt2_small", within) == []
    worse = budget | {"memory_gib": budget["memory_gib"] * 1.021}
    (problem,) = budgets.excesses("gpt2_small", worse)
    assert problem.startswith("gpt2_small: memory_gib is ")
    assert "2.1% above its budget" in problem


def test_traffic_over_axes_without_a_budget_is_named():
    budget = budgets.read()["steps"]["gpt2_small"]
    (problem,) = budgets.excesses("gpt2_small", budget | {"sent_over_tensor_gb": 1.5})
    assert problem.startswith("gpt2_small: sent_over_tensor_gb is 1.5, ")


@pytest.mark.slow
@pytest.mark.full
def test_the_step_of_gpt2_small_is_within_its_budget():
    with jax.default_matmul_precision("default"):  # as `train` and `plan` compile it
        measured = budgets.figures("gpt2_small")
    assert budgets.excesses("gpt2_small", measured) == []
