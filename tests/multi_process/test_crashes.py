"""A few faults of the campaign in ``benchmarks/crash``. (Those of one process that the suite
always has are in ``training/test_resume.py``.)"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.full]

KINDS = ("kill", "term", "stop", "disk", "coordinator", "flip", "side", "unreadable", "nan",
         "loader", "worker", "absent", "tokens", "images")  # fmt: skip
CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "crash"


def strike(folder, processes, **counts):
    """The lines of a campaign with so many faults of each kind, and its exit code."""
    kinds = dict.fromkeys(KINDS, 0) | counts
    numbers = [part for kind, count in kinds.items() for part in (f"--{kind}", str(count))]
    log = folder / "log.jsonl"
    ended = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--folder", str(folder), "--log", str(log),
         "--processes", str(processes), *numbers],
        env=os.environ | {"PYTHONPATH": str(CAMPAIGN.parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )  # fmt: skip
    # The campaign leaves its small disk for when it goes on.
    subprocess.run(["umount", str(folder / "disk")], capture_output=True, check=False)
    assert log.exists(), ended.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if "commit" not in line], ended.returncode


def assert_survived(lines, code, **counts):
    assert [line["problems"] for line in lines if line["problems"]] == []
    assert code == 0
    found = [line.get("kind", "run") for line in lines]
    assert {kind: found.count(kind) for kind in counts} == counts
    assert found.count("run") >= 1


def test_a_process_that_is_killed_and_stopped_ends_bit_equal(tmp_path):
    counts = {"kill": 4, "term": 2, "flip": 20}  # of both layouts, of which this is one
    lines, code = strike(tmp_path, 1, **counts)
    assert_survived(lines, code, kill=2, term=1, flip=20)


def test_damaged_side_files_storage_that_fails_and_streaks_of_nan_leave_no_trace(tmp_path):
    counts = {"side": 3, "unreadable": 1, "nan": 3}
    lines, code = strike(tmp_path, 1, **counts)
    assert [line["problems"] for line in lines if line["problems"]] == []
    assert (code, len(lines)) == (0, 7)


def test_stuck_jobs_end_and_damaged_stores_are_refused(tmp_path):
    counts = {"loader": 2, "worker": 1, "absent": 1, "tokens": 3, "images": 3}
    lines, code = strike(tmp_path, 1, **counts)
    assert [line["problems"] for line in lines if line["problems"]] == []
    assert (code, len(lines)) == (0, 10)


def test_two_processes_of_which_one_stops_dead_or_is_lost_end_bit_equal(tmp_path):
    lines, code = strike(tmp_path, 2, stop=1, coordinator=1)
    assert_survived(lines, code, stop=1, coordinator=1)
