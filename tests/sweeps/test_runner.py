"""Runs of a sweep: trained once, skipped when finished, recorded when they fail."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
from etils import epath

import flax_transformers as ft
from flax_transformers import run as runs
from flax_transformers.checkpointing.config import EarlyStopping
from flax_transformers.cli.parsing import override
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.optim.schedules import Schedule
from flax_transformers.storage.workdir import workdir_lock
from flax_transformers.sweeps import runner
from flax_transformers.sweeps.study import Study, StudyRuns, points
from flax_transformers.sweeps.table import make_table
from flax_transformers.testing import batches_with_nan, tiny_config, write_corpus
from flax_transformers.training.config import Logging
from flax_transformers.training.loop import Outcome
from tests.huggingface.tensors import drawn_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]


@pytest.fixture
def base(tmp_path):
    write_corpus(tmp_path / "text.txt", 20)
    logging = Logging(tensorboard=False)
    return tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=3, logging=logging)


@pytest.fixture
def trained(monkeypatch):
    """Names of the workdirs that were trained in, in order. Instead of training, writes the files
    that a run leaves; `test_fine_tuning` and tests/cli/test_sweep.py train."""
    names = []

    def train(config, workdir, overrides=()):
        names.append(workdir.name)
        steps = config.total_steps
        (workdir / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text("{}")
        row = {"step": steps, "eval/loss": 10.0 * steps + config.seed}
        (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return Outcome(steps, False, {})

    monkeypatch.setattr(runs, "train", train)
    return names


def sweep_of(base, folder, steps=("3",), **fields):
    study = Study(base=base, **fields)
    found = points(study, {"phases.0.steps": steps}, override)
    return StudyRuns(study, tuple(found), found[0], epath.Path(folder))


def trained_all(sweep):
    runner.check(sweep)
    return runner.train_all(sweep.runs)


def test_finished_runs_are_skipped_and_more_values_and_seeds_add_runs(base, tmp_path, trained):
    assert trained_all(sweep_of(base, tmp_path / "all"))
    assert trained == ["steps=3,seed=0"]
    larger = sweep_of(base, tmp_path / "all", ("3", "4"), seeds=2)
    assert [one.run.name for one in runner.results(larger)] == ["steps=3,seed=0"]
    assert trained_all(larger)
    assert trained[1:] == ["steps=4,seed=0", "steps=3,seed=1", "steps=4,seed=1"]
    found = runner.results(larger)
    assert [one.metrics["eval/loss"] for one in found] == [30, 40, 31, 41]


@pytest.mark.parametrize("gone", ["checkpoints/3", "metrics.jsonl", "sweep.json"])
def test_a_run_without_one_of_its_files_is_not_finished(base, tmp_path, trained, gone):
    sweep = sweep_of(base, tmp_path / "all")
    assert trained_all(sweep)
    path = sweep.runs[0].trainings[0].workdir / gone
    path.rmdir() if path.is_dir() else path.unlink()
    assert runner.results(sweep) == []


def test_a_run_that_stopped_early_is_finished_and_scored_at_its_best_evaluation(
    base, tmp_path, trained, monkeypatch
):
    base = replace(base, early_stopping=EarlyStopping(1, metric="eval/accuracy", mode="max"))
    base = replace(base, evaluation=replace(base.evaluation, every_steps=1))
    train = runs.train

    def stops(config, workdir, **settings):
        train(config, workdir, **settings)
        (workdir / "checkpoints" / "2").mkdir()
        rows = [{"step": step, "eval/accuracy": one} for step, one in ((1, 0.5), (2, 0.25))]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Outcome(2, False, {}, stopped_early="no better")

    monkeypatch.setattr(runs, "train", stops)
    sweep = sweep_of(base, tmp_path / "all")
    assert trained_all(sweep) and trained_all(sweep) and len(trained) == 1
    (found,) = runner.results(sweep)
    assert found.metrics == {"step": 1, "eval/accuracy": 0.5}


def test_a_run_that_fails_is_recorded_the_others_go_on_and_it_is_tried_again(
    base, tmp_path, trained, monkeypatch
):
    sweep = sweep_of(base, tmp_path / "all", seeds=2)
    works, diverges = runs.train, "the first step was skipped: lower the\nlearning rate"

    def fails_once(config, workdir, **settings):
        if config.seed == 0:
            raise UserError(diverges)
        return works(config, workdir, **settings)

    monkeypatch.setattr(runs, "train", fails_once)
    assert trained_all(sweep)
    failed, finished = runner.results(sweep)
    assert failed.failure == diverges.replace("\n", " ") and not failed.metrics
    assert finished.metrics and finished.failure is None
    assert make_table(sweep, [failed, finished]).failures == {"steps=3,seed=0": failed.failure}
    monkeypatch.setattr(runs, "train", works)
    assert trained_all(sweep)
    assert trained == ["steps=3,seed=1", "steps=3,seed=0"]
    assert all(one.metrics for one in runner.results(sweep))


def test_a_run_that_really_diverges_is_recorded_with_its_sentence(base, tmp_path, monkeypatch):
    monkeypatch.setattr("flax_transformers.training.resume.batches_on_mesh", batches_with_nan({2}))
    sweep = sweep_of(replace(base, max_consecutive_skips=0), tmp_path / "all")
    assert trained_all(sweep)
    (diverged,) = runner.results(sweep)
    assert "skipped" in diverged.failure and diverged.metrics == {}


def test_an_error_that_is_no_mistake_of_the_user_is_recorded_with_its_type(
    base, tmp_path, monkeypatch
):
    def breaks(*arguments, **settings):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(runs, "train", breaks)
    sweep = sweep_of(base, tmp_path / "all")
    assert trained_all(sweep)
    assert [one.failure for one in runner.results(sweep)] == ["RuntimeError: out of memory"]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_an_output_that_nobody_reads_or_stores_does_not_end_a_sweep(
    base, tmp_path, trained, monkeypatch, number
):
    class Closed(io.StringIO):
        def flush(self):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Closed())
    sweep = sweep_of(base, tmp_path / "sweep", ("3", "4"))
    assert runner.train_all(sweep.runs)
    assert len(trained) == 2


def test_a_run_of_another_process_is_left_to_it(base, tmp_path, capsys):
    sweep = sweep_of(base, tmp_path / "all")
    with workdir_lock(sweep.runs[0].trainings[0].workdir):
        assert trained_all(sweep)
    assert "left out: another process trains in" in capsys.readouterr().out
    assert runner.results(sweep) == []


@pytest.mark.parametrize(
    "outcome", [Outcome(2, True, {}), Outcome(3, False, {}, told_to_stop=True)]
)
def test_a_sweep_that_is_told_to_stop_ends_between_its_runs(base, tmp_path, monkeypatch, outcome):
    stopped, names = outcome, []
    monkeypatch.setattr(
        runs, "train", lambda config, workdir, **_: names.append(workdir.name) or stopped
    )
    assert not trained_all(sweep_of(base, tmp_path / "all", seeds=2))
    assert names == ["steps=3,seed=0"]


def test_a_signal_after_the_last_step_of_a_run_stops_the_sweep(base, tmp_path):
    class Signal(ft.Callback):
        def on_evaluation(self, step, metrics):
            signal.raise_signal(signal.SIGINT)

    told = ft.train(base, tmp_path / "one", callbacks=[Signal()])
    assert (told.step, told.preempted, told.told_to_stop) == (3, False, True)


def test_folders_of_something_else_are_refused(base, tmp_path, trained):
    sweep = sweep_of(base, tmp_path / "all")
    runner.check(sweep)
    other = sweep_of(replace(base, max_consecutive_skips=3), tmp_path / "all")
    with pytest.raises(UserError, match="belongs to another run .max_consecutive_skips 20 -> 3"):
        runner.check(other)
    assert not runner.results(other)
    runner.check(sweep_of(replace(base, logging=Logging(every_steps=2)), tmp_path / "all"))
    changed = replace(sweep.study, variants={"": {"optimizer.weight_decay": 0.5}})
    runner.train_all(sweep.runs)
    with pytest.raises(UserError, match="optimizer.weight_decay"):
        runner.check(replace(sweep, points=tuple(points(changed, {"phases.0.steps": ("3",)},
                                                        override))))  # fmt: skip
    with pytest.raises(UserError, match="holds a single run; choose another --workdir"):
        runner.check(sweep_of(base, tmp_path / "all" / "steps=3,seed=0"))
    (tmp_path / "all" / "steps=3,seed=0" / "sweep.json").unlink()
    with pytest.raises(UserError, match="holds a run that no sweep has started"):
        runner.check(sweep)


def test_a_sweep_of_other_data_or_another_stopping_metric_is_refused(base, tmp_path, trained):
    evaluation = replace(base.evaluation, every_steps=1)
    base = replace(base, early_stopping=EarlyStopping(5), evaluation=evaluation)
    assert trained_all(sweep_of(base, tmp_path / "all"))

    def check(**data):
        runner.check(sweep_of(replace(base, data=replace(base.data, **data)), tmp_path / "all"))

    check(store=str(tmp_path / "elsewhere"), workers=1, verify=False, prepare_processes=1)
    other = str(tmp_path / "other.txt")
    with pytest.raises(UserError, match="belongs to another run .data.source.path"):
        check(source=replace(base.data.source, path=other))
    runner.check(
        sweep_of(
            replace(base, checkpoints=replace(base.checkpoints, keep_latest=7)), tmp_path / "all"
        )
    )
    record = tmp_path / "all" / "sweep.json"
    assert json.loads(record.read_text())["base"]["checkpoints"]["best_mode"] == "min"
    explicit = replace(base.checkpoints, best_mode="min")  # which earlier versions wrote
    runner.check(sweep_of(replace(base, checkpoints=explicit), tmp_path / "all"))
    other_metric = replace(base.checkpoints, best_metric="eval/accuracy")
    with pytest.raises(UserError, match="belongs to another run .checkpoints.best_metric"):
        runner.check(sweep_of(replace(base, checkpoints=other_metric), tmp_path / "all"))


def test_grid_points_are_checked_before_the_first_run(base, tmp_path, trained):
    study = Study(base=base, variants={"a": {}, "b": {"objective.mask_fraction": 0.5}})
    too_long = replace(base.optimizer, schedule=Schedule(warmup_steps=10**6))
    bad = replace(points(study, {}, override)[1], config=replace(base, optimizer=too_long))
    with pytest.raises(UserError, match="grid point b: .*warmup_steps"):
        runner.check(StudyRuns(study, (bad,), bad, epath.Path(tmp_path / "all")))
    assert not (tmp_path / "all").exists()


def test_a_variant_that_changes_what_published_weights_fix_is_refused(base, tmp_path, trained):
    def deeper(base):
        return replace(base, model=replace(base.model, num_layers=7))

    def dropped(base):
        return replace(base, model=replace(base.model, dropout=0.3))

    def beams(base):
        settings = GenerationSettings(num_beams=2)
        return replace(base, model=replace(base.model, generation=settings))

    short = GenerationSettings(max_length=9)
    ft.save_pretrained(tmp_path / "hf", *drawn_model("BertForMaskedLM", generation=short))
    start = replace(base, init_from=str(tmp_path / "hf"))
    runner.check(sweep_of(start, tmp_path / "one", variants={"a": {}, "b": dropped, "c": beams}))
    with pytest.raises(UserError, match="grid point b,steps=3: model.num_layers 7 has no effect"):
        runner.check(sweep_of(start, tmp_path / "all", variants={"a": {}, "b": deeper}))


def test_a_mistake_in_the_config_of_fine_tuning_can_be_corrected_where_it_has_no_checkpoint(
    base, tmp_path, trained, monkeypatch
):
    def fine_tune(steps):
        return lambda config, workdir: replace(
            config, phases=(replace(config.phases[0], steps=steps),)
        )

    works = runs.train

    def fails(config, workdir, **settings):
        if workdir.name.endswith("fine_tuned"):
            raise UserError("too few labels")
        return works(config, workdir, **settings)

    monkeypatch.setattr(runs, "train", fails)
    assert trained_all(sweep_of(base, tmp_path / "all", fine_tune=fine_tune(5)))
    monkeypatch.setattr(runs, "train", works)
    assert trained_all(sweep_of(base, tmp_path / "all", fine_tune=fine_tune(6)))
    assert trained == ["steps=3,seed=0", "steps=3,seed=0,fine_tuned"]
    with pytest.raises(UserError, match="belongs to another run .phases.0.steps 6 -> 7"):
        runner.check(sweep_of(base, tmp_path / "all", fine_tune=fine_tune(7)))


def without_folders(folder):
    """The records of earlier versions."""
    for path in folder.glob("*/sweep.json"):
        record = json.loads(path.read_text())
        del record["folder"]
        path.write_text(json.dumps(record))


@pytest.mark.parametrize("place", ["{workdir}/made.txt", "{parent}/made.txt"])
def test_a_sweep_with_fine_tuning_is_resumed_where_its_folder_was_moved(
    base, tmp_path, trained, place
):
    def fine_tune(config, workdir):
        path = place.format(workdir=workdir, parent=epath.Path(workdir).parent)
        return replace(config, data=replace(config.data, source=TextSource(path)))

    def from_another_step(config, workdir):
        return replace(fine_tune(config, workdir), init_from=f"{workdir}/checkpoints/2")

    assert trained_all(sweep_of(base, tmp_path / "all", fine_tune=fine_tune))
    moved = (tmp_path / "all").rename(tmp_path / "moved")
    if "{workdir}" in place:
        without_folders(moved)
    assert trained_all(sweep_of(base, moved, fine_tune=fine_tune)) and len(trained) == 2
    with pytest.raises(UserError, match="belongs to another run .init_from"):
        runner.check(sweep_of(base, moved, fine_tune=from_another_step))


@pytest.mark.parametrize("of_earlier_version", [False, True])
def test_fine_tuning_from_a_run_of_another_sweep_with_its_name_is_resumed(
    base, tmp_path, trained, of_earlier_version
):
    def fine_tune(config, workdir):
        return replace(config, init_from=f"{tmp_path}/teachers/{epath.Path(workdir).name}")

    sweep = sweep_of(base, tmp_path / "all", fine_tune=fine_tune)
    assert trained_all(sweep)
    if of_earlier_version:
        without_folders(tmp_path / "all")
        assert trained_all(sweep)
    else:
        moved = (tmp_path / "all").rename(tmp_path / "moved")
        assert trained_all(sweep_of(base, moved, fine_tune=fine_tune))
    assert len(trained) == 2


def test_a_warning_names_the_fields_for_all_runs_that_some_do_not_have(
    base, tmp_path, trained, caplog
):
    def another(config, workdir):
        return replace(config, max_consecutive_skips=4)

    given = ("--max-consecutive-skips=5", "--max-rollbacks", "1", "--seed=0", "--init-from=None")
    sweep = sweep_of(override(base, given), tmp_path / "all", fine_tune=another, seeds=2)
    runner.check(replace(sweep, overrides=given))
    assert [one.getMessage() for one in caplog.records] == [
        "--max-consecutive-skips is not set in steps=3,seed=0,fine_tuned, "
        "steps=3,seed=1,fine_tuned, where the study or --grid sets another value"
    ]


def test_an_option_that_earlier_versions_did_not_set_in_fine_tuning_refuses_no_run(
    base, tmp_path, trained
):
    def own_batches(config, workdir):
        return replace(config, evaluation=replace(config.evaluation, batch_size=250))

    base = override(base, given := ("--evaluation.batch-size=8",))
    sweep = sweep_of(base, tmp_path / "all", fine_tune=own_batches)
    assert trained_all(sweep)
    with pytest.raises(UserError, match="belongs to another run .evaluation.batch_size 250 -> 8"):
        runner.check(replace(sweep, overrides=given))
    without_folders(tmp_path / "all")
    assert trained_all(replace(sweep, overrides=given)) and len(trained) == 2


def test_fine_tuning_continues_from_the_weights_and_is_what_is_scored(base, tmp_path, capsys):
    """At a tiny rate, the second training keeps the weights of the first, and so its loss."""

    def fixed(config, workdir):
        return replace(config, optimizer=replace(config.optimizer, learning_rate=1e-9))

    sweep = sweep_of(base, tmp_path / "all", fine_tune=fixed)
    assert trained_all(sweep)
    (found,) = runner.results(sweep)
    first, second = (read_metrics(one.workdir)[-1] for one in found.run.trainings)
    assert found.metrics["eval/loss"] == second["eval/loss"]
    assert second["eval/loss"] == pytest.approx(first["eval/loss"], abs=1e-4)
    (unigram,) = make_table(sweep, [found]).trivial.items()
    assert unigram[0] == "unigram cross-entropy" and 1 < unigram[1] < 5
    capsys.readouterr()
    assert trained_all(sweep)
    assert capsys.readouterr().out.count("finished before") == 2
