"""Comparisons of runs that are paired by their seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

EXACT_PAIRS = 16
"""Up to so many pairs all sign flips are counted, 65,536; of more pairs as many are drawn."""


@dataclass(frozen=True)
class Comparison:
    """The differences of paired values."""

    pairs: int
    difference: float
    """Their mean."""
    p: float
    """Two-sided, of `sign_flip_test`."""
    corrected_p: float
    """After Holm's correction for all comparisons of a table."""


@dataclass(frozen=True)
class Summary:
    """The values of one point over its seeds."""

    n: int
    median: float
    low: float
    high: float
    mean: float
    sd: float
    """The standard deviation of the sample, by n - 1; NaN for one value."""


def summary(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
    return Summary(
        len(values),
        statistics.median(values),
        min(values),
        max(values),
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else math.nan,
    )


def sign_flip_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of a permutation test of paired differences around zero.

    The share of all assignments of signs whose sum is at least as far from zero. It assumes only
    that a difference would be as likely with the other sign. With n pairs it cannot be below
    ``2 / 2 ** n``. Beyond ``EXACT_PAIRS`` pairs it is estimated from drawn signs.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if n <= EXACT_PAIRS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        drawn = np.random.default_rng(0).choice([-1, 1], (2**EXACT_PAIRS - 1, n))
        signs = np.concatenate([np.ones((1, n)), drawn])  # what was observed is one of them
    sums = np.abs(signs @ values)
    return float((sums >= sums[0] - 1e-12 * np.abs(values).sum()).mean())


def compare(values: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Comparison]:
    """Compares each entry of ``values``, by seed, with that of ``reference`` on their common seeds.

    Entries without a common seed are left out. P-values are corrected for the number of entries.
    """
    other, found = values[reference], {}
    for name, own in values.items():
        seeds = sorted(own.keys() & other.keys())
        if name != reference and seeds:
            differences = [own[seed] - other[seed] for seed in seeds]
            p = sign_flip_test(differences)
            found[name] = Comparison(len(seeds), statistics.fmean(differences), p, p)
    corrected = holm([one.p for one in found.values()])
    return {
        name: replace(one, corrected_p=p)
        for (name, one), p in zip(found.items(), corrected, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): the family-wise error rate is kept."""
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
