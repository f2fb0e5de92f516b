"""A run ends when a metric improves no more, and its best step has a name."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from unittest.mock import Mock

import numpy as np
import pytest

from flax_transformers.checkpointing.config import CheckpointConfig, EarlyStopping
from flax_transformers.checkpointing.manager import find_checkpoint, restore_arrays
from flax_transformers.checkpointing.retention import evaluations_since_best
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sequences import SequenceDataset
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.monitoring.goodput import KINDS, Clock
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.pretrained import find_pretrained, is_checkpoint
from flax_transformers.ranges import OutOfRange
from flax_transformers.testing import assert_bit_equal, tiny_config, write_corpus
from flax_transformers.training import loop
from flax_transformers.training.check_run import check_config, check_run
from flax_transformers.training.config import Evaluation
from flax_transformers.training.loop import train_prepared
from flax_transformers.training.run_state import RunPosition, reason_to_stop_early


def since(scores, mode="min", min_delta=0.0):
    rows = [{"step": step, "eval/x": score} for step, score in enumerate(scores)]
    return evaluations_since_best(rows, "eval/x", mode, min_delta)


@pytest.mark.parametrize(
    ("scores", "more", "expected"),
    [
        ([], {}, 0),
        ([3.0], {}, 0),
        ([3.0, 2.0, 2.5, 2.0], {}, 2),
        ([3.0, 2.0, 2.5, 1.9], {}, 0),
        ([3.0, 2.0, 2.5, 1.9], {"min_delta": 0.5}, 2),
        ([0.1, 0.3, 0.2], {"mode": "max"}, 1),
        ([math.nan, math.inf], {}, 2),
        ([math.nan, 1.0, math.nan], {}, 1),
    ],
)
def test_evaluations_are_counted_since_the_last_improvement(scores, more, expected):
    assert since(scores, **more) == expected


def test_a_metric_of_its_own_needs_its_mode():
    with pytest.raises(OutOfRange, match="give both"):
        EarlyStopping(patience=1, metric="eval/accuracy")


SCORES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 1.2}


def config_of(folder, patience=2, **changes):
    config = tiny_config(folder / "text.txt", folder / "store", steps=12, **changes)
    return dataclasses.replace(
        config,
        checkpoints=CheckpointConfig(every_steps=6, keep_latest=1),
        evaluation=Evaluation(every_steps=2, batch_size=16),
        early_stopping=EarlyStopping(patience=patience),
    )


def test_early_stopping_that_has_nothing_to_go_by_is_refused_before_the_run(tmp_path):
    write_corpus(tmp_path / "text.txt", documents=5)
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="but evaluation.every_steps is 0"):
        check_config(dataclasses.replace(config, evaluation=Evaluation(every_steps=0)))
    data = dataclasses.replace(config.data, validation_fraction=0.0)
    config = dataclasses.replace(config, data=data)
    with pytest.raises(UserError, match="has no held-out examples"):
        check_run(config, prepare(data))
    rows = tuple({"tokens": np.arange(3, 9)} for _ in range(4))
    check_run(config, SequenceDataset(rows, rows, tokenizer=ByteTokenizer(), name="rows"))
    with pytest.raises(
        UserError, match=r"'eval/loss', is not among those of the evaluation: eval/"
    ):
        RunPosition(2).evaluated(config, {"eval/accuracy": 1.0})


def test_the_best_steps_by_a_metric_that_no_evaluation_has_are_refused(tmp_path):
    config = dataclasses.replace(config_of(tmp_path), early_stopping=EarlyStopping())
    kept = dataclasses.replace(config.checkpoints, keep_best=1, best_metric="eval/acc_accuracy")
    config = dataclasses.replace(config, checkpoints=kept)
    with pytest.raises(
        UserError, match="'eval/acc_accuracy', is not among .*; set checkpoints.best_m"
    ):
        RunPosition(2).evaluated(config, {"eval/accuracy": 1.0})


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text.txt", documents=20)
    return folder


def run(config, workdir, kill_at=None):
    def score(snapshot):
        if snapshot.step == kill_at:
            raise Killed
        return {"eval/loss": SCORES[snapshot.step]}

    return train_prepared(config, prepare(config.data), workdir, [score])


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_run_that_stops_early_is_through_and_keeps_its_best_step(corpus, tmp_path, caplog):
    config, workdir = config_of(corpus), tmp_path / "run"
    why = "eval/loss has not improved in 2 evaluation(s) since step 4, where it was 1"
    with caplog.at_level("INFO"):
        outcome = run(config, workdir)
    assert (outcome.step, outcome.preempted, outcome.stopped) == (8, False, False)
    assert outcome.stopped_early == why
    assert f"training ends early, at step 8: {why}" in caplog.messages
    steps = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert steps == ["4", "8"]

    caplog.clear()
    with caplog.at_level("INFO"):
        again = run(config, workdir)
    assert again.step == 8 and again.stopped_early == why
    found = [text for text in caplog.messages if text.startswith("already finished at step 8: ")]
    assert found == [
        f"already finished at step 8: {why}; raise early_stopping.patience to train further"
    ]

    best = workdir / "checkpoints" / "best"
    assert is_checkpoint(best) and not best.exists()
    assert find_pretrained(best).step == find_checkpoint(workdir / "best").step == 4
    assert find_checkpoint(workdir).step == 8

    # Killed between the third evaluation and its checkpoint, it ends at the same step.
    other = tmp_path / "other"
    with pytest.raises(Killed):
        run(config, other, kill_at=6)
    assert find_checkpoint(other).step == 4
    resumed = run(config, other)
    assert (resumed.step, resumed.stopped_early) == (8, why)
    mine, theirs = find_checkpoint(other), find_checkpoint(workdir)
    assert mine.meta["evaluations"] == theirs.meta["evaluations"]
    assert_bit_equal(restore_arrays(mine), restore_arrays(theirs))

    # With more patience it goes on.
    assert run(config_of(corpus, patience=3), other).step == 10

    # A damaged best step is skipped, with a warning.
    caplog.clear()
    (workdir / "checkpoints" / "4" / "meta" / "metadata").write_text(
        json.dumps(find_checkpoint(workdir / "checkpoints" / "4").meta) + " "
    )
    assert find_checkpoint(best).step == 8
    assert "4 is damaged" in caplog.text
    shutil.rmtree(workdir / "checkpoints" / "8")
    with pytest.raises(UserError, match="no step in .* has the metric 'eval/loss'"):
        find_checkpoint(best)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_the_best_step_is_that_of_the_metric_of_early_stopping(corpus, tmp_path):
    settings = EarlyStopping(patience=2, metric="eval/accuracy", mode="max")
    config = dataclasses.replace(config_of(corpus), early_stopping=settings)
    accuracy = {2: 0.1, 4: 0.2, 6: 0.9, 8: 0.8, 10: 0.7}

    def score(snapshot):
        return {"eval/loss": SCORES[snapshot.step], "eval/accuracy": accuracy[snapshot.step]}

    outcome = train_prepared(config, prepare(config.data), tmp_path / "run", [score])
    assert outcome.step == 10
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [6, 10]
    assert find_checkpoint(folder / "best").step == 6


def test_best_steps_that_checkpoints_keep_are_by_their_own_metric(tmp_path):
    settings = EarlyStopping(patience=2, metric="eval/accuracy", mode="max")
    config = dataclasses.replace(config_of(tmp_path), early_stopping=settings)
    own = dataclasses.replace(config, checkpoints=CheckpointConfig(keep_best=2))
    assert config.retention.best_metric == "eval/accuracy" and config.retention.keep_best == 1
    assert own.retention == own.checkpoints and own.retention.best_metric == "eval/loss"
    off = dataclasses.replace(config, early_stopping=EarlyStopping())
    assert off.retention == off.checkpoints


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
@pytest.mark.parametrize("fails_at", [4, 12])
def test_an_evaluation_that_failed_is_made_up_for(corpus, tmp_path, fails_at, caplog):
    config = dataclasses.replace(config_of(corpus), early_stopping=EarlyStopping())
    keeps = dataclasses.replace(config.checkpoints, keep_best=1)
    config = dataclasses.replace(config, checkpoints=keeps)
    scored = []

    def score(snapshot):
        if snapshot.step == fails_at and fails_at not in scored:
            scored.append(fails_at)
            raise UserError("the disk is full")
        scored.append(snapshot.step)
        return {"eval/loss": 0.5 if snapshot.step == fails_at else 1.0 + snapshot.step}

    def train():
        return train_prepared(config, prepare(config.data), tmp_path / "run", [score])

    with pytest.raises(UserError, match="the disk is full"):
        train()
    assert find_checkpoint(tmp_path / "run").step == fails_at
    outcome = train()
    assert (outcome.step, outcome.preempted) == (12, False)
    assert scored.count(fails_at) == 2
    evaluations = find_checkpoint(tmp_path / "run").meta["evaluations"]
    assert [row["step"] for row in evaluations] == [2, 4, 6, 8, 10, 12]
    assert find_checkpoint(tmp_path / "run" / "checkpoints" / "best").step == fails_at
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert list((tmp_path / "run" / "checkpoints").glob("unused-*")) == []
    before = list(scored)
    assert train().metrics["eval/loss"] == outcome.metrics["eval/loss"] and scored == before


def test_the_time_before_an_evaluation_that_is_made_up_is_that_of_the_start(corpus, monkeypatch):
    now = [100.0]
    clock = Clock(lambda: now[0])
    clock.resume([{"step": 4, "time": 100.0} | {f"goodput/{kind}_s": 0.0 for kind in KINDS}], 4)
    now[0] += 900  # until the next attempt is ready
    monkeypatch.setattr(loop, "compiled_together", lambda step: step)
    monkeypatch.setattr(loop, "evaluate_run", lambda *given: now.insert(0, now[0] + 5))
    run = Mock(config=config_of(corpus), clock=clock, latest={})
    loop.make_up_evaluation(run, None, RunPosition(step=4))
    seconds = {name: value for name, value in clock.row().items() if value}
    assert seconds == {"goodput/start_s": 900.0, "goodput/evaluation_s": 5.0}


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_metric_that_no_evaluation_has_does_not_lose_the_steps_before(corpus, tmp_path):
    settings = EarlyStopping(patience=2, metric="eval/acuracy", mode="max")
    config = dataclasses.replace(config_of(corpus), early_stopping=settings)
    with pytest.raises(UserError, match="'eval/acuracy', is not among those of the evaluation"):
        run(config, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").step == 2  # of the first evaluation


def test_the_reason_names_a_metric_that_was_never_finite(tmp_path):
    position = RunPosition(4, evaluations=[{"step": s, "eval/loss": math.nan} for s in (2, 4)])
    assert reason_to_stop_early(config_of(tmp_path), position) == (
        "eval/loss was not finite in 2 evaluations"
    )


def test_a_step_without_an_evaluation_of_its_own_is_not_the_best():
    from flax_transformers.checkpointing.step_directories import score_of

    meta = {"position": {"step": 5}, "metrics": {"eval/loss": 1.0}}
    assert score_of(meta, "eval/loss") == 1.0  # of an earlier version
    assert math.isnan(score_of({**meta, "evaluations": []}, "eval/loss"))
    assert math.isnan(score_of({**meta, "evaluations": [{"step": 4}]}, "eval/loss"))
    assert score_of({**meta, "evaluations": [{"step": 5}]}, "eval/loss") == 1.0
