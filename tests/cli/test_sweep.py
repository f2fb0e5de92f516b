"""``sweep``: from the command line to the table, killed half-way and in parts."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys

import pytest

from flax_transformers.cli.main import main
from flax_transformers.sweeps.runner import RECORD
from flax_transformers.testing import write_corpus
from tests.cli.test_main import TINY, refused

STUDY = '''
import os
import signal
from dataclasses import dataclass

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.monitoring.sinks import MetricSink
from flax_transformers.sweeps.study import Study
from flax_transformers.testing import tiny_config
from flax_transformers.training.config import Logging


class Kill(MetricSink):
    """Kills its own process in the second run, after its first checkpoint."""

    def __init__(self, workdir):
        self.checkpoint = workdir / "checkpoints" / "2"

    def write(self, step, metrics):
        kills = os.environ.get("KILL") == self.checkpoint.parents[1].name
        while kills and step == 4:
            if self.checkpoint.exists():
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Killing:
    def open(self, workdir, start_step):
        return Kill(workdir)


def get_study():
    return Study(
        base=tiny_config(
            "text.txt",
            "store",
            steps=5,
            checkpoints=CheckpointConfig(every_steps=2),
            logging=Logging(every_steps=1, tensorboard=False, sinks=(Killing(),)),
        ),
        variants={"slow": {"optimizer.learning_rate": 1e-3}, "fast": {}},
        expected=(("fast", "slow"),),
    )
'''

CONFIG = """
from dataclasses import replace
from flax_transformers.testing import tiny_config


def get_config():
    config = tiny_config("text.txt", "store", steps=3)
    return replace(config, data=replace(config.data, store=None))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_corpus(tmp_path / "text.txt", 20)
    (tmp_path / "small_study.py").write_text(STUDY)
    (tmp_path / "small_config.py").write_text(CONFIG)
    return ["sweep", "small_study.py"]


def table(folder):
    return list(csv.DictReader((folder / "table.csv").open()))


def scores(folder):
    """The loss of each run of a table."""
    return {
        (row["point"], seed): row[seed]
        for row in table(folder)
        for seed in row
        if row["rank"] and seed.startswith("seed_")
    }


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_sweep_that_was_killed_goes_on_and_ends_like_one_that_was_not(study, tmp_path, capsys):
    """A kill within the second of two runs; a report without training; and an array job."""
    killed, part = tmp_path / "killed", tmp_path / "part"
    child = subprocess.run(
        [sys.executable, "-m", "flax_transformers", *study, "--workdir", str(killed)],
        env=os.environ | {"KILL": "fast,seed=0", "JAX_NUM_CPU_DEVICES": "1",
                          "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        capture_output=True,
        check=False,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert (killed / "fast,seed=0" / "checkpoints" / "2").exists()
    assert not (killed / "table.csv").exists()

    assert main([*study, "--workdir", str(killed), "--report"]) == 0
    assert list(scores(killed)) == [("slow", "seed_0")]
    assert "1 of 2 runs are finished." in capsys.readouterr().out
    assert main([*study, "--workdir", str(killed)]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 1
    assert "fast against slow: better by" in out and str(killed / "plot.png") in out
    names = {path.name for path in killed.iterdir()}
    assert names >= {RECORD, "table.md", "table.jsonl", "plot.png"}

    assert main([*study, "--workdir", str(part), "--only", "1/2"]) == 0
    assert list(scores(part)) == [("fast", "seed_0")]
    assert scores(part).items() <= scores(killed).items()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_failed_run_is_named_at_the_end_with_exit_code_2(study, tmp_path, capsys):
    grid = ["--grid", "data.source.path=text.txt,absent.txt"]
    said = refused(capsys, "sweep", "small_config.py", *grid, "--workdir", str(tmp_path / "all"))
    assert "1 of 2 runs failed, and the same command tries them again; path=absent" in said
    assert "absent.txt; check the path" in said
    assert list(scores(tmp_path / "all")) == [("path=text.txt", "seed_0")]
    assert "Failed runs:" in (tmp_path / "all" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--grid", "optimizer.lerning_rate=1"), "did you mean --optimizer.learning-rate?"),
        (("--grid", "model.num_heads=4,3"), "grid point num_heads=3: "),
        (("--grid", "seed=1"), "give the number of seeds with --seeds"),
        (("--optimizer.lerning-rate", "1"), "did you mean --optimizer.learning-rate?"),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1"),
        (("--metric", "eval/mine"), "add --maximize or --minimize"),
        (("--maximize", "--minimize"), "exclude each other"),
        (("--baseline", "steps=9", "--grid", "phases.0.steps=1,2"), "--baseline is one of steps=1"),
        (("--only", "2/2"), "--only 2/2 is not INDEX/COUNT with INDEX from 0 and below COUNT"),
        (("--only", "x"), "--only x is not INDEX/COUNT"),
        (("--report",), "no run of this sweep is finished in"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_written(capsys, tmp_path, arguments, says):
    folder = tmp_path / "all"
    assert says in refused(capsys, "sweep", TINY, "--workdir", str(folder), *arguments)
    assert not folder.exists()


def test_a_workdir_and_a_study_are_needed(capsys, tmp_path):
    assert "--workdir is missing" in refused(capsys, "sweep", TINY)
    assert "is missing; see flax-transformers sweep --help" in refused(capsys, "sweep")
    file = tmp_path / "wrong_study.py"
    file.write_text("def get_study():\n    return 3\n")
    said = refused(capsys, "sweep", str(file), "--workdir", str(tmp_path / "w"))
    assert said.endswith(f"get_study() of {file} must return a Study, not <class 'int'>")


@pytest.mark.usefixtures("one_device")
def test_a_part_without_a_run_ends_well_before_another_part_has_finished(study, tmp_path, capsys):
    part = [*study, "--workdir", str(tmp_path / "all")]
    assert main([*part, "--only", "5/8"]) == 0
    assert "no run of this sweep is finished yet" in capsys.readouterr().out
    assert "no run of this sweep is finished in" in refused(capsys, *part, "--report")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_an_option_for_all_runs_that_the_study_replaces_in_some_is_named(study, tmp_path, caplog):
    only = ["--only", "2/3", "--workdir", str(tmp_path / "all")]
    assert main([*study, *only, "--optimizer.learning-rate", "0.01"]) == 0
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        "--optimizer.learning-rate is not set in slow,seed=0, where the study or --grid sets "
        "another value"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_together_trains_the_seeds_of_a_point_by_one_program(study, tmp_path, capsys):
    workdir = ["--workdir", str(tmp_path / "sweep")]
    assert main(["sweep", "small_config.py", *workdir, "--seeds", "2", "--together"]) == 0
    assert "runs 1 to 2 of 2: seed=0, seed=1" in capsys.readouterr().out
    assert len(scores(tmp_path / "sweep")) == 2
    stopping = ["--early-stopping.patience", "2", "--evaluation.every-steps", "1"]
    arguments = ["sweep", "small_config.py", "--workdir", str(tmp_path / "other"), "--together"]
    assert "early_stopping cannot be trained together" in refused(capsys, *arguments, *stopping)
