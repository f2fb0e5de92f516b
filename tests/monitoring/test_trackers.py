"""Sinks of metric trackers, each against its client in offline mode where that is installed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from etils import epath

from flax_transformers.config_json import from_json, to_json
from flax_transformers.errors import UserError
from flax_transformers.monitoring import trackers
from flax_transformers.monitoring.trackers import (
    Csv,
    Mlflow,
    TrackerSink,
    Trackio,
    WeightsAndBiases,
)

CONFIG = {"type": "train_config", "seed": 3, "optimizer": {"learning_rate": 0.5}}


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return epath.Path(folder)


def interrupted(sink, workdir):
    """Steps 1 to 3, a break, and steps 3 and 4 of a run that resumes after step 2."""
    with sink.open(workdir, 0) as opened:
        for step in (1, 2, 3):
            opened.write(step, {"train/loss": 10.0 - step, "perf/mfu": 0.5})
        opened.flush()
    with sink.open(workdir, 2) as opened:
        for step in (3, 4):
            opened.write(step, {"train/loss": 20.0 - step})


def test_csv_has_each_step_once(workdir):
    interrupted(Csv(), workdir)
    with (workdir / "metrics.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["step", "name", "value"]
    losses = {int(step): float(value) for step, name, value in rows if name == "train/loss"}
    assert losses == {1: 9.0, 2: 8.0, 3: 17.0, 4: 16.0}
    assert len(rows) == 4 + 2


def test_a_csv_that_is_given_to_a_second_training_goes_on(workdir):
    sink = Csv().open(workdir, 0)
    for step in (1, 2):
        with sink:
            sink.write(step, {"train/loss": 10.0 - step})
    lines = (workdir / "metrics.csv").read_text().splitlines()
    assert lines[1:] == ["1,train/loss,9.0", "2,train/loss,8.0"]


def test_a_client_that_cannot_go_on_in_a_second_training_is_reported(caplog):
    def log_row(step, row):
        if step == 2:
            raise RuntimeError("the run is finished")

    sink = TrackerSink("Closed", log_row, lambda: None)
    for step in (1, 2):
        with sink:
            sink.write(step, {})
    assert "Closed failed (RuntimeError: the run is finished)" in caplog.text


def test_a_damaged_csv_does_not_stop_a_run(workdir):
    (workdir / "metrics.csv").write_bytes(b"\xff,\x00\nstep,name\n1,train/loss,2.0\n7,x\n")
    with Csv().open(workdir, 5) as sink:
        sink.write(6, {"train/loss": 1.0})
    assert (workdir / "metrics.csv").read_text().splitlines()[1:] == [
        "1,train/loss,2.0",
        "6,train/loss,1.0",
    ]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(caplog):
    calls = []

    def log_row(step, row):
        calls.append(step)
        raise ConnectionError("no route")

    sink = TrackerSink("Failing", log_row, lambda: None)
    for step in range(3):
        sink.write(step, {"train/loss": 1.0})
    sink.close()
    assert calls == [0]
    assert "Failing failed (ConnectionError: no route)" in caplog.text


@pytest.mark.parametrize(
    "sink", [Csv("x.csv"), WeightsAndBiases(mode="offline"), Mlflow(), Trackio(name="n")]
)
def test_a_sink_is_saved_with_the_config(sink):
    assert from_json(json.loads(json.dumps(to_json(sink)))) == sink


@pytest.mark.parametrize("sink", [WeightsAndBiases(), Mlflow(), Trackio()])
def test_a_client_that_is_not_installed_is_named(monkeypatch, workdir, sink):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(UserError, match="logging.sinks .* install it with pip install"):
        sink.open(workdir, 0)


def test_weights_and_biases_offline_continues_one_run(monkeypatch, workdir):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted(WeightsAndBiases(mode="offline", project="p"), workdir)
    run_id = (workdir / "wandb_run.txt").read_text().strip()
    files = sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(run_id in file.name for file in files)
    assert all(file.stat().length > 0 for file in files)
    assert wandb.run is None  # finished


def test_mlflow_has_all_steps_of_an_interrupted_run_in_one(workdir):
    mlflow = pytest.importorskip("mlflow")
    sink = Mlflow(experiment="e", tracking_uri=f"sqlite:///{workdir}/m.db")
    interrupted(sink, workdir)
    client = mlflow.MlflowClient(f"sqlite:///{workdir}/m.db")
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.5"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [
        (1, 9.0), (2, 8.0), (3, 7.0), (3, 17.0), (4, 16.0)
    ]  # fmt: skip


def test_trackio_continues_one_run(workdir):
    pytest.importorskip("trackio")
    program = f"""
import sys
from etils import epath
from tests.monitoring.test_trackers import interrupted
from flax_transformers.monitoring.trackers import Trackio
interrupted(Trackio(project="p", name="n"), epath.Path({str(workdir)!r}))
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("p")
print(sorted((row["step"], row["train/loss"]) for row in SQLiteStorage.get_logs("p", run)))
"""
    environment = os.environ | {"TRACKIO_DIR": str(workdir / "trackio")}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    rows = ended.stdout
    assert all(f"({step}, " in rows for step in (1, 2, 3, 4)), rows
