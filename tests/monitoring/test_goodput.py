"""Every second of a run counts once, also those between its attempts."""

from __future__ import annotations

import pytest

from flax_transformers.monitoring.goodput import KINDS, Clock


class Hands:
    """A clock that is moved by hand."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def spend(clock, hands, **seconds):
    for kind, time in seconds.items():
        hands.now += time
        clock.lap(kind)


def seconds(row):
    return {kind: row[f"goodput/{kind}_s"] for kind in KINDS if row[f"goodput/{kind}_s"]}


def test_goodput_is_the_share_of_the_steps():
    hands = Hands()
    clock = Clock(hands)
    assert clock.row()["perf/goodput"] == 0
    spend(clock, hands, start=5, compile=10, steps=30, evaluation=3, checkpoint=2)
    spend(clock, hands, steps=50)
    row = clock.row()
    assert row["perf/goodput"] == 0.8
    expected = {"start": 5, "compile": 10, "steps": 80, "evaluation": 3, "checkpoint": 2}
    assert seconds(row) == expected


def rows_of_a_run(hands):
    """Rows after steps 10, 20 and 30, ten seconds of steps each."""
    clock, rows = Clock(hands), []
    spend(clock, hands, start=4)
    for step in (10, 20, 30):
        spend(clock, hands, steps=10)
        rows.append({"step": step, "time": hands.now} | clock.row())
        rows.append({"step": step, "time": hands.now, "eval/loss": 1.0})
    return rows


@pytest.mark.parametrize(
    ("step", "steps", "start"),
    [
        (20, 20, 4 + 10 + 60),  # steps 21 to 30 were lost, and the machine away for a minute
        (0, 0, 4 + 30 + 60),  # nothing was saved
        (30, 30, 4 + 60),
    ],
)
def test_what_was_lost_with_an_attempt_is_a_start(step, steps, start):
    hands = Hands()
    rows = rows_of_a_run(hands)
    hands.now += 60
    clock = Clock(hands)
    clock.resume(rows, step)
    clock.lap("start")
    assert seconds(clock.row()) == {k: v for k, v in (("steps", steps), ("start", start)) if v}


def test_rows_of_a_version_without_rollouts_are_continued():
    hands = Hands()
    rows = [
        {name: value for name, value in row.items() if name != "goodput/rollouts_s"}
        for row in rows_of_a_run(hands)
    ]
    clock = Clock(hands)
    clock.resume(rows, 30)
    spend(clock, hands, rollouts=5)
    assert seconds(clock.row()) == {"start": 4, "steps": 30, "rollouts": 5}


def test_a_run_that_begins_has_nothing_to_take_over():
    hands = Hands()
    clock = Clock(hands)
    clock.resume([], 0)
    spend(clock, hands, steps=1)
    assert clock.row()["perf/goodput"] == 1


def test_a_clock_that_is_set_back_takes_nothing_away():
    hands = Hands()
    clock = Clock(hands)
    spend(clock, hands, steps=5)
    hands.now -= 100
    clock.lap("steps")
    assert seconds(clock.row()) == {"steps": 5}
