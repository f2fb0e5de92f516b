"""Seeds of a point that one program trains, against the same runs one after another."""

from __future__ import annotations

import contextlib
import json
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath

from flax_transformers.checkpointing.config import CheckpointConfig, EarlyStopping
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.checkpointing.step_directories import finished_steps
from flax_transformers.cli.parsing import override
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.run import train
from flax_transformers.storage.workdir import workdir_lock
from flax_transformers.sweeps import runner, together
from flax_transformers.sweeps.study import Study, StudyRuns, points
from flax_transformers.testing import batches_with_nan, tiny_config, write_corpus
from flax_transformers.training import loop, resume
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.config import Evaluation, Logging, Phase

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

NAMES = ["seed=0", "seed=1", "seed=2"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """On one device."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    write_corpus(tmp_path / "text.txt", 20)
    found = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=6)
    return replace(
        found,
        logging=Logging(every_steps=2, tensorboard=False, example_log=True),
        evaluation=Evaluation(every_steps=3),
        checkpoints=CheckpointConfig(every_steps=2),
    )


def sweep_of(base, folder, seeds=3, **fields):
    study = Study(base=base, seeds=seeds, **fields)
    found = points(study, {}, override)
    return StudyRuns(study, tuple(found), found[0], epath.Path(folder))


def trained(sweep, together=True):
    runner.check(sweep, together=together)
    assert runner.train_all(sweep.runs, together=together)
    return {one.run.name: one for one in runner.results(sweep)}


@pytest.fixture
def programs(monkeypatch):
    """How many runs each call of `train_together` had."""
    counts, call = [], runner.train_together

    def counted(ready):
        counts.append(len(ready))
        return call(ready)

    monkeypatch.setattr(runner, "train_together", counted)
    return counts


def numbers(workdir):
    """The rows of metrics without what depends on time."""
    timed = ("time", "perf/", "goodput/")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in read_metrics(workdir)
    ]


def assert_same_runs(ours, theirs, **tolerance):
    found, expected = numbers(ours), numbers(theirs)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(one.values()), list(other.values()), **tolerance)
    params = (restore_params(find_checkpoint(one)) for one in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), *params)


def test_runs_leave_what_they_leave_one_after_another(base, tmp_path, programs, monkeypatch):
    every = jax.local_devices()
    monkeypatch.setattr(jax, "devices", lambda: every)
    first = base.phases[0]
    phases = replace(first, steps=4), replace(first, steps=2, batch_size=2 * first.batch_size)
    base = replace(base, phases=phases, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    found = trained(sweep_of(base, tmp_path / "together"))
    assert programs == [3] and list(found) == NAMES
    assert len({one.metrics["eval/loss"] for one in found.values()}) == 3
    trained(sweep_of(base, tmp_path / "apart"), together=False)
    for name in NAMES:
        ours, theirs = tmp_path / "together" / name, tmp_path / "apart" / name
        assert_same_runs(ours, theirs, rtol=2e-4, atol=2e-5)
        assert (ours / "ledger-0.jsonl").read_text() == (theirs / "ledger-0.jsonl").read_text()
        steps = [finished_steps(epath.Path(one) / "checkpoints") for one in (ours, theirs)]
        assert steps[0] == steps[1]
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        record = json.loads((ours / "sweep.json").read_text())
        assert (record["finished_step"], record["failure"]) == (6, None)
    before = (tmp_path / "together" / "seed=0" / "metrics.jsonl").read_text()
    trained(sweep_of(base, tmp_path / "together", seeds=4))
    assert programs == [3] and len(runner.results(sweep_of(base, tmp_path / "together", 4))) == 4
    assert (tmp_path / "together" / "seed=0" / "metrics.jsonl").read_text() == before


class Killed(BaseException):
    pass


def killed_at(monkeypatch, number, seed):
    """The batches of a run up to number ``number``; asking for the next one kills the process."""

    @contextlib.contextmanager
    def batches(config, prepared, mesh, position):
        with batches_on_mesh(config, prepared, mesh, position) as plain:
            step = position.step

            def some():
                for count, batch in enumerate(plain, step):
                    if count == number and config.seed == seed:
                        raise Killed
                    yield batch

            yield some()

    monkeypatch.setattr(resume, "batches_on_mesh", batches)


@pytest.mark.parametrize("alone", [False, True])
def test_killed_runs_are_resumed_together_or_alone(base, tmp_path, monkeypatch, programs, alone):
    straight = sweep_of(base, tmp_path / "straight", seeds=2)
    trained(straight)
    sweep = sweep_of(base, tmp_path / "killed", seeds=2)
    with monkeypatch.context() as patch:
        killed_at(patch, 3, seed=1)
        with pytest.raises(Killed):
            trained(sweep)
    assert not runner.results(sweep)
    if alone:
        for run in sweep.runs:
            train(run.trainings[0].config, run.trainings[0].workdir)
        tolerance = {"rtol": 2e-4, "atol": 2e-5}
    else:
        trained(sweep)
        tolerance = {"rtol": 0, "atol": 0}
    for name in NAMES[:2]:
        assert_same_runs(tmp_path / "killed" / name, tmp_path / "straight" / name, **tolerance)


def test_runs_at_different_steps_are_resumed_one_after_another(base, tmp_path, programs, capsys):
    sweep = sweep_of(base, tmp_path / "sweep", seeds=2)
    short = replace(base, phases=(replace(base.phases[0], steps=4),))
    runner.check(sweep)
    (tmp_path / "sweep" / "seed=0").mkdir()
    runner._record(sweep.runs[0].trainings[0])
    train(short, tmp_path / "sweep" / "seed=0")
    found = trained(sweep)
    assert "one after another, as they resume from different steps" in capsys.readouterr().out
    assert [found[name].metrics["step"] for name in NAMES[:2]] == [6, 6]


def test_a_run_that_diverges_does_not_stop_the_others(base, tmp_path, monkeypatch, programs):
    spoilt = batches_with_nan({1, 2})

    def batches(config, *arguments):
        return (spoilt if config.seed == 1 else batches_on_mesh)(config, *arguments)

    base = replace(base, max_consecutive_skips=1)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "batches_on_mesh", batches)
        found = trained(sweep_of(base, tmp_path / "sweep"))
    assert "not finite" in found["seed=1"].failure and not found["seed=1"].metrics
    assert found["seed=0"].metrics["step"] == found["seed=2"].metrics["step"] == 6
    trained(sweep_of(base, tmp_path / "plain"))
    for name in ("seed=0", "seed=2"):
        assert_same_runs(tmp_path / "sweep" / name, tmp_path / "plain" / name, rtol=0, atol=0)
    found = trained(sweep_of(base, tmp_path / "sweep"))  # tries it again, alone
    assert programs == [3, 3] and found["seed=1"].metrics


def test_second_trainings_with_the_tokenizers_of_the_first_are_together_too(
    base, tmp_path, programs
):
    def fine_tune(config, workdir):
        tokenizer = TokenizerConfig(path=f"{workdir}/tokenizer")
        data = replace(config.data, tokenizer=tokenizer, store=None)
        return replace(config, data=data, phases=(Phase(2, 32, 8),))

    found = trained(sweep_of(base, tmp_path / "sweep", seeds=2, fine_tune=fine_tune))
    assert programs == [2, 2] and [one.metrics["step"] for one in found.values()] == [2, 2]


@pytest.mark.full  # test_runs_at_different_steps_are_resumed_one_after_another goes this way, too
def test_configs_with_other_differences_are_trained_one_after_another(base, tmp_path, programs):
    def fine_tune(config, workdir):
        steps = 3 + config.seed
        return replace(config, phases=(Phase(steps, 32, 8),))

    found = trained(sweep_of(base, tmp_path / "sweep", seeds=2, fine_tune=fine_tune))
    assert programs == [2] and [one.metrics["step"] for one in found.values()] == [3, 4]


def test_an_evaluation_that_fails_ends_and_saves_its_run_alone(base, tmp_path, monkeypatch):
    evaluate = loop.evaluate_run

    def fails(run, *arguments):
        if run.config.seed == 1:
            raise UserError("the held-out data cannot be read")
        return evaluate(run, *arguments)

    base = replace(base, checkpoints=CheckpointConfig(every_steps=0))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_run", fails)
        found = trained(sweep_of(base, tmp_path / "sweep", seeds=2))
    assert found["seed=1"].failure == "the held-out data cannot be read"
    assert found["seed=0"].metrics["step"] == 6
    assert finished_steps(epath.Path(tmp_path / "sweep" / "seed=1" / "checkpoints")) == [3]


def test_a_signal_saves_all_runs_and_they_go_on(base, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def batches(config, prepared, mesh, position):
        with batches_on_mesh(config, prepared, mesh, position) as plain:
            yield (
                (signal.raise_signal(signal.SIGTERM) if count == 3 else None, one)[1]
                for count, one in enumerate(plain)
            )

    sweep = sweep_of(base, tmp_path / "sweep", seeds=2)
    runner.check(sweep, together=True)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "batches_on_mesh", batches)
        assert not runner.train_all(sweep.runs, together=True)
    for name in NAMES[:2]:
        assert finished_steps(epath.Path(tmp_path / "sweep" / name / "checkpoints"))[-1] == 4
    found = trained(sweep)
    row = found["seed=1"].metrics
    assert row["step"] == 6 and row["goodput/start_s"] > 0


def test_a_run_of_another_process_is_left_to_it(base, tmp_path, capsys, programs):
    sweep = sweep_of(base, tmp_path / "sweep")
    with workdir_lock(sweep.runs[1].trainings[0].workdir):
        assert list(trained(sweep)) == ["seed=0", "seed=2"]
    assert capsys.readouterr().out.count("left out: another process trains in") == 1
    assert programs == [2]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"early_stopping": EarlyStopping(2)}, "early_stopping"),
        ({"max_rollbacks": 1}, "max_rollbacks"),
        ({"checkpoints": CheckpointConfig(export_every=2)}, "checkpoints.export_every"),
    ],
)
def test_runs_that_need_not_take_the_same_steps_are_refused(base, tmp_path, fields, named):
    sweep = sweep_of(replace(base, **fields), tmp_path / "sweep")
    with pytest.raises(UserError, match=f"{named} cannot be trained together; leave --together"):
        runner.check(sweep, together=True)
    assert not (tmp_path / "sweep").exists()


def test_configs_of_one_program_differ_in_seed_and_start_alone(base):
    together.check_equal_configs([base, replace(base, seed=3), replace(base, init_from="b")])
    with pytest.raises(together.NotTogether, match="differ in ema, not only in the seed"):
        together.check_equal_configs([base, replace(base, ema=replace(base.ema, decay=0.9))])
