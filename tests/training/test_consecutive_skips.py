"""A run does not roll back to steps saved while steps were skipped, and NaN replaces no state."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from flax_transformers.checkpointing.manager import (
    CheckpointConfig,
    Checkpoints,
    find_checkpoint,
    restore_arrays,
)
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.testing import assert_bit_equal, batches_with_nan, tiny_config, write_corpus
from flax_transformers.training import loop, resume
from flax_transformers.training.callbacks import Callback
from flax_transformers.training.config import Evaluation
from flax_transformers.training.setup import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

STEPS = 8


@pytest.fixture
def config(tmp_path):
    """Saved after every step, of which three are kept."""
    write_corpus(tmp_path / "text.txt", documents=20)
    found = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=STEPS)
    return dataclasses.replace(
        found, max_consecutive_skips=4, checkpoints=CheckpointConfig(every_steps=1)
    )


@pytest.fixture
def spoil(monkeypatch):
    bad = set()
    monkeypatch.setattr(resume, "batches_on_mesh", batches_with_nan(bad))
    return bad.update


def train(config, workdir, stop_at=None, evaluators=()):
    """Trains; asked to stop (SIGTERM) after the step ``stop_at``."""
    if stop_at is None:
        return loop.train_prepared(config, prepare(config.data), workdir, evaluators)

    class Interrupt(Callback):
        def on_step(self, step, state):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    outcome = loop.train_prepared(
        config, prepare(config.data), workdir, evaluators, callbacks=[Interrupt()]
    )
    assert (outcome.step, outcome.preempted) == (stop_at, True)
    return outcome


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_a_streak_longer_than_what_is_kept_leaves_the_checkpoints_before_it(
    config, spoil, tmp_path, caplog
):
    """Five saves would have been due in the streak, and three are kept."""
    spoil(range(3, 99))
    with pytest.raises(UserError, match=r"gradients of 5 steps in a row are not finite"):
        train(config, tmp_path / "run")
    assert steps_in(tmp_path / "run") == [1, 2, 3]
    assert "step 5 is not saved: the last 2 step(s) were skipped" in caplog.text


def test_a_rollback_goes_to_before_the_streak_also_where_a_stop_was_saved_in_it(
    config, spoil, tmp_path, caplog
):
    caplog.set_level("INFO", "flax_transformers")
    spoil(range(2, 7))
    config = dataclasses.replace(config, max_rollbacks=1)
    train(config, tmp_path / "run", stop_at=4)
    saved = find_checkpoint(tmp_path / "run")
    assert (saved.step, saved.meta["consecutive_skips"]) == (4, 2)
    assert train(config, tmp_path / "run").step == STEPS
    assert "resuming from step 4" in caplog.text
    assert "rolled back to step 2; the 80 examples" in caplog.text
    assert "4 was saved while steps were being skipped: set aside as unused-4-0" in caplog.text
    assert find_checkpoint(tmp_path / "run").meta["position"]["rollbacks"] == 1


def test_a_run_stopped_within_a_streak_resumes_to_the_very_end_of_one_that_was_not(
    config, spoil, tmp_path
):
    spoil({2, 3, 4})
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, every_steps=3))
    train(config, tmp_path / "straight")
    train(config, tmp_path / "stopped", stop_at=4)
    train(config, tmp_path / "stopped")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert_bit_equal(
        restore_arrays(find_checkpoint(stopped)), restore_arrays(find_checkpoint(straight))
    )
    assert steps_in(stopped) == steps_in(straight) == [6, 7, 8]
    # The row of step 6 is of steps 4 to 6, of which the first was taken before the stop.
    assert means(stopped) == means(straight)


def test_an_evaluation_of_a_skipped_step_follows_after_the_next_good_one(config, spoil, tmp_path):
    """The best step by it has a checkpoint then, also where the run is stopped before."""
    spoil({3})
    config = dataclasses.replace(
        config,
        evaluation=Evaluation(every_steps=2, batch_size=16),
        checkpoints=CheckpointConfig(every_steps=0, keep_latest=1, keep_best=1),
    )

    def score(snapshot):
        return {"eval/loss": abs(snapshot.step - 5)}

    for name, stop_at in (("straight", None), ("stopped", 4)):
        workdir = tmp_path / name
        if stop_at is not None:
            train(config, workdir, stop_at, [score])
            assert find_checkpoint(workdir).meta["consecutive_skips"] == 1
        train(config, workdir, None, [score])
        steps = [row["step"] for row in find_checkpoint(workdir).meta["evaluations"]]
        assert steps == [2, 5, 6, 8]
        assert find_checkpoint(workdir / "checkpoints" / "best").step == 5


def means(workdir):
    kept = ("step", "train/", "optimizer/")
    rows = ({k: v for k, v in row.items() if k.startswith(kept)} for row in read_metrics(workdir))
    return [row for row in rows if "optimizer/skipped_steps" in row]


@pytest.mark.full
def test_the_first_row_after_a_resume_averages_the_steps_before_it_too(config, tmp_path):
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, every_steps=3))
    train(config, tmp_path / "straight")
    train(config, tmp_path / "stopped", stop_at=5)
    train(config, tmp_path / "stopped")
    straight = means(tmp_path / "straight")
    assert [row["step"] for row in straight] == [3, 6, 8]
    assert means(tmp_path / "stopped") == straight


def test_a_run_that_ends_in_a_streak_is_saved_and_does_not_end_well_however_often_it_is_started(
    config, spoil, tmp_path
):
    spoil({6, 7})
    for _ in range(2):
        with pytest.raises(UserError, match="ended at step 8 without a finite loss: the last 2"):
            train(config, tmp_path / "run")
    assert steps_in(tmp_path / "run") == [4, 5, 6, 8]
    last, before = (
        restore_arrays(tmp_path / "run" / "checkpoints" / str(step))["params"] for step in (8, 6)
    )
    assert_bit_equal(last, before)


def test_a_run_whose_last_step_alone_is_skipped_keeps_its_result(config, spoil, tmp_path, caplog):
    """Nothing but the end is saved."""
    spoil({7})
    config = dataclasses.replace(config, checkpoints=CheckpointConfig(every_steps=0))
    for _ in range(2):
        assert train(config, tmp_path / "run").step == STEPS
    assert steps_in(tmp_path / "run") == [STEPS]
    assert find_checkpoint(tmp_path / "run").meta["consecutive_skips"] == 1
    assert caplog.text.count("the last step, 8, was skipped") == 2


@pytest.mark.full
def test_a_score_that_is_not_finite_at_the_end_is_an_error(config, tmp_path):
    config = dataclasses.replace(config, evaluation=Evaluation(every_steps=0, batch_size=16))
    prepared = prepare(config.data)
    for _ in range(2):  # the second time nothing is trained
        with pytest.raises(UserError, match="ended at step 8 with eval/loss not finite"):
            loop.train_prepared(
                config, prepared, tmp_path / "run", [lambda _: {"eval/loss": float("nan")}]
            )


@pytest.fixture
def with_nan(config, tmp_path):
    """A run of five steps, and two checkpoints as an older version left them: statistics of the
    optimizer that are NaN, and nothing in meta about skipped steps."""
    workdir, mesh = tmp_path / "run", make_mesh(config.mesh)
    train(config, workdir, stop_at=5)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoints)
        restored = checkpoints.restore_newest(make_trainer(config, mesh).abstract)
        meta = {k: v for k, v in restored.meta.items() if k not in ("consecutive_skips", "totals")}
        spoilt = restored.state.replace(
            opt_state=jax.tree.map(
                lambda leaf: leaf * jnp.nan if leaf.ndim else leaf, restored.state.opt_state
            )
        )
        for step in (6, 7):
            position = meta["position"] | {"step": step, "examples": 16 * step}
            checkpoints.save(step, spoilt.replace(step=spoilt.step + step - 5), meta | {
                "position": position
            })  # fmt: skip
        checkpoints.close()
    return workdir


def test_checkpoints_that_are_not_finite_are_passed_over_and_named(
    config, with_nan, tmp_path, caplog
):
    caplog.set_level("INFO", "flax_transformers")
    train(config, tmp_path / "straight")
    assert steps_in(with_nan) == [5, 6, 7]
    assert train(config, with_nan).step == STEPS
    for step in (6, 7):
        assert f"{step} holds values that are not finite: set aside as unused-{step}-0" in (
            caplog.text
        )
    assert "resuming from step 5" in caplog.text
    assert_bit_equal(
        restore_arrays(find_checkpoint(with_nan)),
        restore_arrays(find_checkpoint(tmp_path / "straight")),
    )


@pytest.mark.full
def test_where_no_checkpoint_is_finite_a_sentence_says_so_and_nothing_changes(config, with_nan):
    shutil.rmtree(with_nan / "checkpoints" / "5")
    for _ in range(2):
        with pytest.raises(UserError, match=(
            "can be used: step 7 holds values that are not finite, step 6 holds .*and there is none"
        )):  # fmt: skip
            train(config, with_nan)
    assert steps_in(with_nan) == [6, 7]
