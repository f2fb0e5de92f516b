"""The audit trail of example ids."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.monitoring.example_log import ExampleLog


def write(workdir, steps, start_step=0):
    with ExampleLog(workdir, start_step) as log:
        for step in steps:
            log.write(step, np.array([step * 10, step * 10 + 1], np.int64))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "ledger-0.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_that_can_be_read_at_once(tmp_path):
    with ExampleLog(tmp_path, 0) as log:
        log.write(1, np.array([7, 3]))
        assert lines(tmp_path) == [{"step": 1, "ids": [7, 3]}]
        log.write(2, np.array([5, 9]))
    assert lines(tmp_path)[1:] == [{"step": 2, "ids": [5, 9]}]


def test_a_run_that_goes_on_drops_what_lies_beyond_its_start(tmp_path):
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 7), start_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "ledger-0.jsonl", "a") as file:
        file.write('{"step": 3, "ids": [30, ')
    write(tmp_path, [3], start_step=2)
    assert lines(tmp_path)[2:] == [{"step": 3, "ids": [30, 31]}]


def test_nothing_is_written_before_the_first_step(tmp_path):
    write(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_files_of_processes_that_are_gone_are_cut_too(tmp_path):
    write(tmp_path, [1, 2, 3])
    (tmp_path / "ledger-0.jsonl").rename(tmp_path / "ledger-3.jsonl")
    write(tmp_path, [3], start_step=2)
    kept = (tmp_path / "ledger-3.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2]


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    with ExampleLog(tmp_path, 0) as log:
        (tmp_path / "ledger-0.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"ledger-0.jsonl cannot be written \(No space left"):
            log.write(1, np.array([7]))
