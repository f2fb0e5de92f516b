"""The loop end to end on a tiny corpus, in this process."""

import dataclasses
import json
import multiprocessing
import shutil
from collections import Counter
from types import SimpleNamespace

import jax
import pytest

import flax_transformers as ft
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.data.dataset import prepare
from flax_transformers.errors import AgreedError, UserError
from flax_transformers.evaluation.held_out import held_out_evaluator
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.parallel.watchdog import Watchdog
from flax_transformers.testing import (
    assert_bit_equal,
    batches_with_nan,
    tiny_bert,
    tiny_config,
    write_corpus,
)
from flax_transformers.training import loop, resume
from flax_transformers.training.config import Phase
from flax_transformers.training.loop import train_prepared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text.txt", documents=20)
    return folder


def config_for(corpus, **changes):
    return tiny_config(corpus / "text.txt", corpus / "store", **changes)


def run(config, workdir, evaluate=False):
    prepared = prepare(config.data)
    evaluators = [held_out_evaluator(config, prepared)] if evaluate else []
    return train_prepared(config, prepared, workdir, evaluators)


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """Twelve steps without a stop, with held-out scores."""
    workdir = tmp_path_factory.mktemp("straight")
    outcome = run(config_for(corpus, steps=12), workdir, evaluate=True)
    return workdir, outcome


@pytest.fixture(scope="module")
def short(corpus, tmp_path_factory):
    """A finished run of three steps, to be copied."""
    workdir = tmp_path_factory.mktemp("short")
    run(config_for(corpus, steps=3), workdir)
    return workdir


@pytest.fixture
def copied(short, tmp_path):
    return shutil.copytree(short, tmp_path / "run")


def test_the_loss_falls_and_every_step_has_a_row(straight):
    workdir, outcome = straight
    losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
    assert outcome.step == 12 and not outcome.preempted
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1.0


def test_a_run_is_in_the_phase_of_what_it_does(corpus, tmp_path, monkeypatch):
    """So that the limits of `parallel/limits.py` hold."""
    enter, entered = Watchdog.enter, Counter()

    def noted(self, name, explain=None):
        entered[name] += 1
        enter(self, name, explain)

    monkeypatch.setattr(Watchdog, "enter", noted)
    run(config_for(corpus, steps=2), tmp_path / "run", evaluate=True)
    assert entered == {
        "prepare": 1, "restore": 1, "first_batch": 2, "data": 2, "compile": 2, "step": 1,
        "evaluation": 1, "save": 2,
    }  # fmt: skip


def test_a_run_that_a_callback_stops_is_saved_and_resumes_to_the_same_end(
    straight, corpus, tmp_path, caplog
):
    class StopAtFive(ft.Callback):
        def on_step(self, step, state):
            if step == 5:
                self.stop("the fifth step")

    config = config_for(corpus, steps=12)
    with caplog.at_level("WARNING"):
        outcome = train_prepared(config, prepare(config.data), tmp_path, callbacks=[StopAtFive()])
    assert (outcome.step, outcome.stopped, outcome.preempted) == (5, True, False)
    assert "a callback stops the run at step 5: the fifth step" in caplog.text
    resumed = run(config, tmp_path, evaluate=True)
    assert (resumed.step, resumed.stopped) == (12, False)
    assert resumed.metrics["eval/loss"] == straight[1].metrics["eval/loss"]


@pytest.mark.multi_process
def test_a_run_whose_data_worker_is_killed_is_saved(corpus, tmp_path):
    class Kill(ft.Callback):
        def on_step(self, step, state):
            for worker in multiprocessing.active_children():
                worker.kill()

    config = config_for(corpus, steps=40)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1))
    with pytest.raises(UserError, match="exit code -9"):
        train_prepared(config, prepare(config.data), tmp_path, callbacks=[Kill()])
    losses = [row["step"] for row in read_metrics(tmp_path) if "train/loss" in row]
    assert find_checkpoint(tmp_path).step == losses[-1] > 0


def test_held_out_scores_are_logged_at_the_end(straight):
    _, outcome = straight
    assert 0.0 < outcome.metrics["eval/loss"] < 6.0
    assert 0.0 <= outcome.metrics["eval/accuracy"] <= 1.0


def test_phases_follow_one_another_and_may_not_be_merged_when_they_are_done(corpus, tmp_path):
    """A run of two phases that is started again is through."""
    config = config_for(corpus, steps=3)
    two = dataclasses.replace(config, phases=(Phase(3, 32, 16), Phase(3, 48, 8)))
    first = run(two, tmp_path)
    again = run(two, tmp_path)
    assert first.step == again.step == 6
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 7))
    one = dataclasses.replace(config, phases=(Phase(9, 32, 16),))
    with pytest.raises(UserError, match=r"has trained phases of 3 steps before phases.1, "):
        run(one, tmp_path)


def test_a_finished_run_that_is_given_more_steps_goes_on_in_its_phase(straight, copied, corpus):
    assert run(config_for(corpus, steps=5), copied).step == 5
    lines, expected = (
        (workdir / "ledger-0.jsonl").read_text().splitlines() for workdir in (copied, straight[0])
    )
    assert lines == expected[:5]


def test_a_finished_run_is_not_trained_further(straight, corpus):
    workdir, _ = straight
    before = restore_params(workdir)
    outcome = run(config_for(corpus, steps=12), workdir)
    assert outcome.step == 12
    assert_bit_equal(restore_params(workdir), before)


def test_another_model_is_refused_before_anything_is_overwritten(straight, corpus):
    workdir, _ = straight
    saved = (workdir / "config.json").read_text()
    other = config_for(corpus, steps=12, model=tiny_bert(hidden_size=48))
    with pytest.raises(UserError, match=r"belongs to another run \(model.hidden_size 32 -> 48\)"):
        run(other, workdir)
    assert (workdir / "config.json").read_text() == saved


def test_other_text_under_the_same_path_is_refused(tmp_path, monkeypatch):
    """The place in the data would mean something else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_corpus(tmp_path / "text.txt", documents=20)
    run(config_for(tmp_path, steps=3), tmp_path / "run")
    write_corpus(tmp_path / "text.txt", documents=21)
    again = config_for(tmp_path, steps=3)
    moved = dataclasses.replace(again, data=dataclasses.replace(again.data, store=None))
    with pytest.raises(UserError, match="was trained on other data"):
        run(moved, tmp_path / "run")


def test_a_row_length_may_not_change_within_a_phase(copied, corpus):
    longer = config_for(corpus, steps=6, sequence_length=48)
    with pytest.raises(UserError, match="in the middle of a phase with sequence_length 32"):
        run(longer, copied)


def test_when_all_checkpoints_are_damaged_nothing_starts_over(copied, corpus):
    for file in (copied / "checkpoints" / "3" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes() + b"!")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint in .* passes verification"):
            run(config_for(corpus, steps=3), copied)
    assert len(read_metrics(copied)) >= 3


def test_a_rate_may_change_when_a_run_goes_on(straight, corpus, caplog):
    workdir, _ = straight
    caplog.set_level("INFO", "flax_transformers")
    changed = dataclasses.replace(config_for(corpus, steps=12).optimizer, learning_rate=5e-3)
    run(config_for(corpus, steps=12, optimizer=changed), workdir)
    assert "optimizer.learning_rate 0.01 -> 0.005" in caplog.text


def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoint(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "batches_on_mesh", batches_with_nan(range(6, 40)))
    with pytest.raises(UserError, match="4 steps in a row"):
        run(config_for(corpus, steps=40, max_consecutive_skips=3), tmp_path)
    assert find_checkpoint(tmp_path).step == 5


def test_a_batch_the_mesh_does_not_divide_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    config = config_for(corpus, batch_size=12, mesh=MeshConfig(data=8))
    with pytest.raises(UserError, match="batch_size 12 does not divide .* such as 8 or 16"):
        run(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_checkpoint_holds_config_position_and_tokenizer(straight):
    workdir, _ = straight
    found = find_checkpoint(workdir)
    assert found.meta["position"] == {"step": 12, "phase": 0, "examples": 192, "rollbacks": 0}
    assert found.meta["config"]["model"]["hidden_size"] == 32
    assert (found.folder / "tokenizer" / "tokenizer_config.json").exists()


def test_the_example_log_shows_each_example_once_an_epoch(straight):
    workdir, _ = straight
    lines = (workdir / f"ledger-{jax.process_index()}.jsonl").read_text().splitlines()
    ids = [i for line in lines for i in json.loads(line)["ids"]]
    epoch = max(ids) + 1
    assert len(ids) == 12 * 16 and len(ids) > epoch
    for start in range(0, len(ids) - epoch + 1, epoch):
        assert sorted(ids[start : start + epoch]) == list(range(epoch))


@pytest.mark.parametrize(
    ("processes", "error", "saves"),
    [(1, UserError, 1), (2, UserError, 0), (1, AgreedError, 1), (2, AgreedError, 1)],
)
def test_an_error_of_one_of_several_processes_is_raised_without_saving(
    processes, error, saves, monkeypatch
):
    """The other processes go on, and a save would wait for them."""
    saved = []
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(loop, "save", lambda *_, **__: saved.append(1))
    nothing = SimpleNamespace(flush=lambda: None, fetch_previous=lambda: None)
    run = SimpleNamespace(listeners=nothing, online=object())

    def fail():
        raise error("the bucket cannot be read")

    with pytest.raises(UserError, match="the bucket cannot be read"):
        loop._saving_first(run, None, SimpleNamespace(step=3), nothing, fail)
    assert len(saved) == saves
