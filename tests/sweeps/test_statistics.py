"""Summaries, the sign-flip test and Holm's correction, against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from flax_transformers.sweeps import statistics
from flax_transformers.sweeps.statistics import compare, holm, sign_flip_test, summary


def test_the_spread_of_a_sample_is_divided_by_n_minus_1():
    found = summary([3.0, 1.0, 2.0, 10.0])
    assert (found.n, found.median, found.low, found.high, found.mean) == (4, 2.5, 1.0, 10.0, 4.0)
    assert found.sd == pytest.approx(math.sqrt((1 + 9 + 4 + 36) / 3))
    assert math.isnan(summary([1.0]).sd)


def test_differences_of_one_sign_have_the_smallest_p_of_their_number():
    assert sign_flip_test([0.3]) == 1.0
    assert sign_flip_test([0.1, 0.2, 0.3]) == 2 / 8
    assert sign_flip_test([-0.1, -0.2, -0.3, -0.4, -0.5]) == 2 / 32


def test_a_mixed_sample_counts_the_signs_that_reach_its_sum():
    # Sums of ±1 ±2 ±4: 7 5 3 1 and their negatives. |1 + 4 - 2| = 3 is reached by 6 of 8.
    assert sign_flip_test([1.0, -2.0, 4.0]) == 6 / 8
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1.0


def test_the_exact_test_is_that_of_scipy():
    from scipy import stats  # which takes a second to import

    own = [0.41, -0.13, 0.27, 0.08, 0.33, -0.02, 0.19]
    theirs = stats.permutation_test(
        (own,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_test(own) == pytest.approx(theirs.pvalue)


def test_many_pairs_are_tested_with_drawn_signs(monkeypatch):
    own = [0.41, -0.13, 0.27, 0.08, 0.33, -0.22, 0.19, -0.09, 0.11, 0.02, -0.31, 0.14]
    exact = sign_flip_test(own)
    sums = [abs(np.dot(signs, own)) for signs in itertools.product([1, -1], repeat=len(own))]
    assert exact == pytest.approx(np.mean(np.array(sums) >= abs(sum(own)) - 1e-12))
    monkeypatch.setattr(statistics, "EXACT_PAIRS", 11)
    assert sign_flip_test(own) == pytest.approx(exact, abs=0.05)  # 2,048 draws: 5 sigma
    assert sign_flip_test(own) != exact


def test_holm_multiplies_by_the_comparisons_left_and_never_decreases():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_only_common_seeds_are_compared():
    values = {
        "a": {0: 1.0, 1: 2.0, 2: 3.0},
        "b": {1: 2.5, 2: 3.25, 3: 100.0},
        "c": {7: 1.0},
    }
    found = compare(values, "a")
    assert list(found) == ["b"]
    assert (found["b"].pairs, found["b"].difference) == (2, 0.375)
    assert found["b"].p == found["b"].corrected_p == 0.5


def test_p_values_are_corrected_for_all_other_points():
    values = {
        "a": dict.fromkeys(range(6), 0.0),
        "b": dict.fromkeys(range(6), 1.0),
        "c": {seed: (-1.0) ** seed for seed in range(6)},
    }
    found = compare(values, "a")
    assert found["b"].p == 2 / 64 and found["b"].corrected_p == 4 / 64
    assert found["c"].p == found["c"].corrected_p == 1.0
