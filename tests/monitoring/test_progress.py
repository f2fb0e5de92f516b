"""The progress bar, its plain-line form and the estimate of the time left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from flax_transformers.monitoring.progress import Pace, Progress, format_duration, format_number

METRICS = {"train/loss": 6.2534, "train/accuracy": 0.0816, "perf/tokens_per_second": 85321.0}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(width=80, terminal=False, steps=(1, 2, 4), total=4, seconds=1.0, metrics=None, **options):
    """What a run draws, escape codes included; the first step takes 30 seconds to compile."""
    clock, out = Clock(), io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=terminal, color_system=None, legacy_windows=False
    )
    with Progress(total, console=console, clock=clock, **options) as progress:
        clock.now += 30
        for step in steps:
            progress.write(step, METRICS if metrics is None else metrics)
            console.print(f"note {step}")
            clock.now += seconds
    return out.getvalue()


def frames(text):
    """The lines a terminal showed, one after another, escape codes removed."""
    lines = re.split(r"\n|\r\x1b\[2K|\r", text)
    return [plain for line in lines if (plain := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line))]


def test_without_a_terminal_lines_are_plain_and_not_wrapped():
    assert run(width=20, line_seconds=1.5).splitlines() == [
        "step 1/4  loss 6.253  acc  8.2%  85.3k tok/s",
        "note 1",
        "note 2",
        "note 4",
        "step 4/4  loss 6.253  acc  8.2%  85.3k tok/s  done in 32s",
    ]


def test_plain_lines_come_every_so_many_seconds_and_for_the_last_step():
    lines = run(steps=range(1, 101), total=100, line_seconds=40.0).splitlines()
    shown = [int(line.split("/")[0].split()[1]) for line in lines if line.startswith("step")]
    assert shown == [1, 41, 81, 100]


def test_plain_lines_say_how_long_is_left():
    lines = run(steps=range(1, 6), total=300, seconds=2.0, line_seconds=0.0).splitlines()
    assert lines[8].endswith("tok/s   9m 50s left")


def test_on_a_terminal_the_bar_shows_step_loss_accuracy_speed_and_time_left():
    shown = frames(run(terminal=True, steps=(1, 2, 600), total=1000))
    last = [line for line in shown if line.startswith("  600/1,000")][-1]
    assert re.fullmatch(
        r"  600/1,000  ━+╸?━*\s*  loss 6\.253  acc  8\.2%  85\.3k tok/s  stopped after 33s", last
    )


def test_on_a_terminal_messages_stay_above_the_bar_word_for_word():
    shown = frames(run(terminal=True))
    assert [line for line in shown if "note" in line] == [
        "note 1",
        "note 2",
        "note 4",
    ]
    assert shown[-1].startswith("4/4  ━")
    assert shown[-1].endswith("done in 32s")


def test_until_the_first_step_is_done_the_bar_says_that_it_compiles():
    first = frames(run(terminal=True))[0]
    assert re.fullmatch(r"0/4 +compiling the first step   0s", first)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_the_bar_never_exceeds_the_width_of_the_terminal(width):
    text = run(width, terminal=True, steps=(999_998, 999_999, 1_000_000), total=1_000_000)
    bars = [line for line in frames(text) if "note" not in line]
    assert max(len(line) for line in bars) <= width


def test_a_width_of_80_holds_every_field_of_a_long_run():
    text = run(terminal=True, steps=range(999_000, 999_003), total=1_000_000, seconds=100.0)
    assert any(
        re.search(r"[━╸]  loss 6\.253  acc  8\.2%  85\.3k tok/s   1d 03h left$", line)
        for line in frames(text)
    )


def test_a_narrow_terminal_gives_up_speed_before_loss():
    text = run(60, terminal=True, steps=(1, 2), total=1000, metrics=METRICS)
    assert any("loss 6.253" in line and "left" in line for line in frames(text))
    assert "tok/s" not in frames(text)[-1]


def test_a_plain_line_has_only_numbers_that_no_line_before_it_had():
    clock, out = Clock(), io.StringIO()
    with Progress(600, console=Console(file=out), clock=clock, line_seconds=10.0) as progress:
        for step in range(1, 71):
            row = {"train/loss": 3.0 + step} if step % 50 == 0 else {}
            progress.write(step, row | {"optimizer/grad_norm": 1.0})
            clock.now += 1.0
    assert out.getvalue().splitlines() == [
        "step   1/600",
        "step  31/600   9m 29s left",
        "step  50/600  loss 53.000   9m 10s left",
        "step  70/600  stopped after 1m 10s",
    ]


def test_of_rollouts_the_reward_is_shown_and_not_the_loss():
    metrics = {"train/loss": 1.8e-10, "rollout/reward": 0.29140625}
    lines = run(metrics=metrics).splitlines()
    assert lines[0] == "step 1/4  reward 0.291"


def test_the_bar_of_a_terminal_keeps_metrics_that_are_not_given_again():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with Progress(2, console=console) as progress:
        progress.write(1, METRICS)
        progress.write(2, {})
    assert "loss 6.253  acc  8.2%" in frames(out.getvalue())[-1]


def test_the_cursor_comes_back_when_the_run_fails():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, legacy_windows=False)
    with pytest.raises(KeyError), Progress(5, console=console):
        raise KeyError("broken")
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


def pace_of(times, steps=None):
    pace = Pace()
    for step, now in zip(steps or range(1, len(times) + 1), times, strict=True):
        pace.add(step, now)
    return pace.seconds_per_step()


def test_the_pace_ignores_the_time_before_the_first_step():
    assert pace_of([1000.0]) is None
    assert pace_of([1000.0, 1002.0, 1004.0]) == 2.0


def test_the_pace_is_per_step_when_updates_skip_steps():
    assert pace_of([0.0, 5.0, 20.0], steps=[10, 20, 50]) == 0.5


def test_one_long_pause_counts_as_twenty_steps():
    assert pace_of([0.0, 1.0, 2.0, 1002.0, 1003.0]) == (1 + 1 + 20 + 1) / 4


def test_short_regular_pauses_count_in_full():
    assert pace_of([0.0, 1.0, 2.0, 8.0, 9.0]) == 9 / 4


def test_the_time_between_updates_of_the_same_step_counts():
    # Each step is dispatched, then waited for; every second one is evaluated for four seconds.
    steps = [1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5]
    times = [30, 31, 31, 32, 36, 36, 37, 37, 38, 42, 42]
    assert pace_of(times, steps) == 3.0


def test_the_pace_forgets_the_distant_past():
    slow = [10.0 * step for step in range(50)]
    fast = [490.0 + step for step in range(1, Pace.WINDOW + 1)]
    assert pace_of(slow + fast) == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (985, "985"),
        (0.5, "0.50"),
        (999.6, "1.00k"),
        (1234, "1.23k"),
        (9_999, "10.0k"),
        (85_321, "85.3k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (110e6, "110M"),
        (8.03e9, "8.03B"),
        (1.2e15, "1200T"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_are_three_digits_and_a_magnitude(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (3599.9, "1h 00m"),
        (18_120, "5h 02m"),
        (86_400 * 3 + 3600 * 4, "3d 04h"),
        (float("inf"), "?"),
    ],
)
def test_durations_are_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text
