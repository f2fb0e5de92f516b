"""Which steps are kept when a new one is written."""

from types import SimpleNamespace

import pytest

from flax_transformers.checkpointing.retention import Retention


def retention(latest=3, every=None, best=0, mode="min", **known):
    return Retention(latest, every, best, mode, **known)


def test_the_latest_are_kept():
    assert retention().kept([5, 10, 15, 20, 25]) == {15, 20, 25}


def test_steps_saved_in_a_streak_take_no_place_and_stay_only_while_they_are_the_newest():
    streak = {20, 25, 30}
    assert retention(unproven=streak).kept([5, 10, 15, 20, 25, 30]) == {5, 10, 15, 30}
    assert retention(unproven=streak).kept([5, 10, 15, 30, 35]) == {10, 15, 35}


def test_a_step_saved_in_a_streak_is_neither_kept_for_good_nor_the_best():
    kept = retention(1, every=10, best=1, scores={5: 2.0, 10: 1.0, 20: 3.0}, unproven={10})
    assert kept.kept([5, 10, 20, 30]) == {5, 20, 30}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_score_that_is_not_finite_is_never_the_best(mode, bad):
    kept = retention(1, best=1, mode=mode, scores={5: bad, 10: 2.0, 15: bad, 20: bad})
    assert kept.kept([5, 10, 15, 20]) == {10, 20}


def test_folders_of_another_run_are_neither_counted_nor_deleted():
    assert retention(2, foreign={999}).kept([5, 10, 15, 999]) == {10, 15, 999}


def test_orbax_is_told_to_leave_links_alone():
    steps = [SimpleNamespace(step=step) for step in (5, 10, 15)]
    assert retention(1, links={5}).should_preserve(steps, context=None) == [True, False, True]
