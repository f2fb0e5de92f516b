"""Copying a damaged text: what the guess proposes, and that it knows nothing it may not know."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.baselines.copying import (
    COPYING,
    IN_GAP,
    LOST,
    followed,
    mixed_cross_entropy,
    mixture_weights,
)

MASK, END = 9, 1


def trace(source, target):
    situations, right, share = followed(np.array(source), np.array(target), MASK)
    return situations.tolist(), right.tolist(), share.tolist()


def test_a_text_is_copied_token_by_token_and_a_gap_left_where_the_copy_goes_on():
    source, target = [2, 3, MASK, 4, END], [2, 3, 7, 8, 4, END]
    situations, right, share = trace(source, target)
    assert situations == [
        COPYING,
        COPYING + 1,
        IN_GAP,  # what a [MASK] hides; the token behind it is proposed
        IN_GAP + 1,
        IN_GAP + 2,
        COPYING + 1,
    ]
    assert right == [1, 1, 0, 0, 1, 1]
    assert share == [1 / 4, 1 / 3, 0, 0, 1 / 2, 1]


def test_a_sentence_that_was_moved_is_found_by_the_token_that_was_written():
    situations, right, _ = trace([5, 6, 2, 3, 4, END], [2, 3, 4, 5, 6, END])
    # At 2 and at 5 another sentence begins; 4 was followed by the end, which is proposed.
    assert right == [0, 1, 1, 0, 1, 0]
    assert situations == [COPYING, COPYING, COPYING + 1, COPYING + 2, COPYING, COPYING + 1]


def test_two_tokens_in_order_end_a_gap_elsewhere():
    situations, right, _ = trace([2, MASK, 3, 5, 6, 7], [2, 5, 6, 7])
    assert situations == [COPYING, IN_GAP, IN_GAP + 1, COPYING + 1]
    assert right == [1, 0, 0, 1]


def test_behind_the_source_there_is_nothing_to_copy():
    assert trace([2], [2, 3, 3])[0] == [COPYING, LOST, LOST]


@pytest.mark.parametrize("seed", range(5))
def test_a_guess_is_a_distribution_and_knows_only_what_was_written_before(seed):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, MASK + 1, 12), rng.integers(0, MASK, 15)
    weights = rng.dirichlet(np.ones(3), 3 + 2 * 8)
    common = rng.dirichlet(np.ones(MASK))  # of all that can be written
    for place in range(len(target)):
        total = 0.0
        for token in range(MASK):
            asked = np.concatenate([target[:place], [token], target[place + 1 :]])
            situations, right, share = followed(source, asked, MASK)
            chances = np.stack([right, share, common[asked]], axis=1)
            now = situations[place : place + 1], chances[place : place + 1]
            total += np.exp(-mixed_cross_entropy(*now, weights))
        assert total <= 1 + 1e-12
        situation = situations[place]
        missing = weights[situation, 0] * (situation == LOST)
        left = any(followed(source, np.append(target[:place], token), MASK)[2][-1] > 0
                   for token in range(MASK))  # fmt: skip
        missing += 0 if left else weights[situation, 1]
        assert total == pytest.approx(1 - missing, abs=1e-12)


def test_weights_are_those_under_which_the_tokens_are_likeliest():
    rng = np.random.default_rng(0)
    situations = np.repeat([COPYING, IN_GAP], 5000)
    copies = rng.random(10_000) < np.where(situations == COPYING, 0.9, 0.2)
    chances = np.stack([copies, np.zeros(10_000), np.where(copies, 1e-9, 0.5)], axis=1)
    weights = mixture_weights(situations, chances)
    assert weights[COPYING] == pytest.approx([0.9, 0, 0.1], abs=0.02)
    assert weights[IN_GAP] == pytest.approx([0.2, 0, 0.8], abs=0.02)
    assert weights[LOST] == pytest.approx([1 / 3] * 3)  # never seen
