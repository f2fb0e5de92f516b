"""When a checkpoint is saved, and how a run ends, around steps that are skipped."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from flax_transformers.checkpointing.save_schedule import SaveSchedule
from flax_transformers.errors import UserError
from flax_transformers.training import loop
from flax_transformers.training.callbacks import Listeners
from flax_transformers.training.loop import require_finite_end
from flax_transformers.training.run_state import RunPosition

TOTAL = 12


@pytest.fixture
def saved(monkeypatch):
    """What `_save` saves for a step: the fields of the meta about skipped steps."""

    def save_meta(config, prepared, position, metrics, totals, **skips):
        return skips

    monkeypatch.setattr(loop, "checkpoint_meta", save_meta)

    def save(step, skips=0, diverging=0, stopping=False):
        found = {}
        checkpoints = SimpleNamespace(
            directory=Path(), save=lambda at, state, meta, files: found.update({at: meta})
        )
        run = SimpleNamespace(
            config=SimpleNamespace(total_steps=TOTAL),
            prepared=None,
            latest={},
            checkpoints=checkpoints,
            tokenizer_files={},
            listeners=Listeners(),
        )
        step_metrics = SimpleNamespace(
            consecutive_skips=skips, diverging_steps=diverging, totals={}
        )
        assert loop.save(run, None, RunPosition(step), step_metrics, stopping) == bool(found)
        return found

    return save


@pytest.mark.parametrize("diverging", [0, 1, 3])
def test_the_end_of_a_run_is_saved_also_where_its_last_steps_were_skipped(saved, diverging):
    skips = max(1, diverging)
    meta = {"consecutive_skips": skips, "diverging_steps": diverging}
    assert saved(TOTAL, skips, diverging) == {TOTAL: meta}


def test_before_the_end_a_skipped_step_is_saved_only_where_the_run_stops(saved):
    assert saved(7, 2, 2) == {}
    assert saved(7, 2, 2, stopping=True) == {7: {"consecutive_skips": 2, "diverging_steps": 2}}
    assert saved(7) == {7: {"consecutive_skips": 0, "diverging_steps": 0}}


def steps_saved(every, skipped, phase_ends=(TOTAL,)):
    """The steps after which a run saves whose steps ``skipped`` are skipped."""
    saves, found = SaveSchedule(every), []
    for step in range(1, TOTAL + 1):
        if saves.is_due(step, step in phase_ends) and step not in skipped:
            found.append(step)
            saves.saved()
    return found


def test_a_save_that_falls_on_a_skipped_step_follows_after_the_next_good_one():
    assert steps_saved(5, skipped=()) == [5, 10, 12]
    assert steps_saved(5, skipped={5}) == [6, 10, 12]
    assert steps_saved(5, skipped={4, 5, 6, 7}) == [8, 10, 12]
    assert steps_saved(5, skipped={3, 10, 11}) == [5, 12]


def test_the_end_of_a_phase_that_is_skipped_is_saved_in_the_next_phase():
    assert steps_saved(0, skipped=(), phase_ends=(4, TOTAL)) == [4, 12]
    assert steps_saved(0, skipped={4, 5}, phase_ends=(4, TOTAL)) == [6, 12]


def end(diverging_steps, **metrics):
    losses = {name.replace("_", "/"): value for name, value in metrics.items()}
    require_finite_end("run", TOTAL, losses, diverging_steps)


def test_a_run_whose_last_step_alone_was_skipped_ends_with_a_warning(caplog):
    end(1, train_loss=2.0, eval_loss=3.0)
    assert caplog.messages == [
        "the last step, 12, was skipped, as its values are not finite; the last checkpoint holds "
        "the parameters from before it"
    ]


def test_a_run_that_ends_well_says_nothing(caplog):
    end(0, train_loss=2.0)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("skips", "metrics", "message"),
    [
        (2, {"train_loss": 2.0}, "ended at step 12 without a finite loss: the last 2 steps were"),
        (1, {}, "ended at step 12 without a finite loss: every step was skipped"),
        (1, {"train_loss": math.nan}, "ended at step 12 with train/loss not finite"),
        (1, {"train_loss": 2.0, "eval_loss": math.inf}, "ended at step 12 with eval/loss not"),
        (0, {"train_loss": math.inf}, "ended at step 12 with train/loss not finite"),
    ],
)
def test_a_run_that_ends_without_a_finite_loss_is_an_error(skips, metrics, message):
    with pytest.raises(UserError, match=message):
        end(skips, **metrics)
