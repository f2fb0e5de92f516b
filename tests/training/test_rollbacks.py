"""A run of which too many steps in a row are skipped goes back, and past the data since."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time

import pytest

from flax_transformers.checkpointing import manager
from flax_transformers.checkpointing.manager import (
    CheckpointConfig,
    find_checkpoint,
    restore_arrays,
)
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.testing import assert_bit_equal, batches_with_nan, tiny_config, write_corpus
from flax_transformers.training import loop, resume

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

STEPS, SAVED_EVERY = 12, 5


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "text.txt", documents=20)
    found = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=STEPS)
    return dataclasses.replace(
        found,
        max_consecutive_skips=2,
        max_rollbacks=1,
        checkpoints=CheckpointConfig(every_steps=SAVED_EVERY),
        logging=dataclasses.replace(found.logging, example_log=True),
    )


@pytest.fixture
def spoil(monkeypatch):
    """Makes the batches of these places in the stream NaN."""
    bad = set()
    monkeypatch.setattr(resume, "batches_on_mesh", batches_with_nan(bad))
    return bad.update


def train(config, workdir):
    return loop.train_prepared(config, prepare(config.data), workdir)


def trained_on(workdir):
    """The examples of each step."""
    rows = map(json.loads, (workdir / "ledger-0.jsonl").read_text().splitlines())
    return {row["step"]: row["ids"] for row in rows}


def test_a_run_goes_back_to_its_checkpoint_and_past_the_data_since(config, spoil, tmp_path, caplog):
    train(config, tmp_path / "straight")
    stream = list(trained_on(tmp_path / "straight").values())
    spoil({7, 8, 9, 10})
    outcome = train(config, tmp_path / "run")
    assert (outcome.step, outcome.preempted) == (STEPS, False)
    # Batches 7, 8 and 9 are skipped, after which steps 6 to 10 are taken again, from batch 10 on.
    taken = trained_on(tmp_path / "run")
    assert list(taken) == list(range(1, STEPS + 1))
    assert [taken[step] for step in (1, 5, 6, 7)] == [stream[i] for i in (0, 4, 10, 11)]
    assert "rolled back to step 5; the 80 examples since are left out" in caplog.text
    rows = [row["step"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert rows == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]  # batch 10, of step 6, is skipped as well
    assert outcome.metrics["optimizer/skipped_steps"] == 1


def test_a_run_that_went_back_and_was_killed_goes_on_where_it_was(config, spoil, tmp_path):
    spoil({7, 8, 9})
    train(config, tmp_path)
    newest = find_checkpoint(tmp_path)
    straight, rows = restore_arrays(newest), config.phases[0].batch_size
    examples = (STEPS + 5) * rows  # those of five steps went unused, or were undone
    assert newest.meta["position"] == {
        "step": STEPS, "phase": 0, "examples": examples, "rollbacks": 1
    }  # fmt: skip
    shutil.rmtree(newest.folder)
    assert find_checkpoint(tmp_path).step == 2 * SAVED_EVERY
    train(config, tmp_path)
    assert_bit_equal(restore_arrays(find_checkpoint(tmp_path)), straight)
    assert list(trained_on(tmp_path)) == list(range(1, STEPS + 1))


def test_a_run_goes_back_no_more_often_than_it_may_and_keeps_its_checkpoint(
    config, spoil, tmp_path
):
    spoil(range(7, 99))
    with pytest.raises(UserError, match="gradients of 3 steps in a row are not finite"):
        train(config, tmp_path)
    assert find_checkpoint(tmp_path).step == SAVED_EVERY


def test_a_checkpoint_that_is_still_being_written_is_waited_for(
    config, spoil, tmp_path, monkeypatch, caplog
):
    commit = manager.Checkpoints._before_commit

    def slowly(self):
        time.sleep(2)
        commit(self)

    monkeypatch.setattr(manager.Checkpoints, "_before_commit", slowly)
    spoil({SAVED_EVERY, SAVED_EVERY + 1, SAVED_EVERY + 2})
    assert train(config, tmp_path).step == STEPS
    assert f"rolled back to step {SAVED_EVERY};" in caplog.text


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(config, spoil, tmp_path):
    spoil({0, 1, 2})
    with pytest.raises(UserError, match="before the first checkpoint, and the run cannot"):
        train(config, tmp_path)
