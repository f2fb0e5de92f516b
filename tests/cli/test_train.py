"""``train``: with a config file, and without one to resume the run of a workdir."""

from __future__ import annotations

import argparse

import pytest

from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli import train
from flax_transformers.cli.main import main
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.testing import write_corpus
from tests.cli.test_main import TINY, refused, small  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("line", "file", "overrides"),
    [
        ("a.py --workdir w", "a.py", ""),
        ("--workdir w a.py --seed 3", "a.py", "--seed 3"),
        ("--workdir w", None, ""),
        ("--workdir w --seed 3", None, "--seed 3"),
        ("--seed 3 --workdir w", None, "--seed 3"),
        (
            "--workdir w --objective.mean 0.1 0.2 --seed 3",
            None,
            "--objective.mean 0.1 0.2 --seed 3",
        ),
        ("--workdir w --seed=3", None, "--seed=3"),
        ("no_config --workdir w", "no_config", ""),
    ],
)
def test_options_are_told_from_the_config_file(line, file, overrides):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    known, rest = parser.parse_known_args(line.split())
    known.tokens = line.split()
    assert train._file_and_overrides(known, rest) == (file, overrides.split())


@pytest.mark.slow
def test_the_workdir_alone_resumes_its_run(small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    workdir = str(tmp_path / "run")
    assert main(["train", TINY, "--workdir", workdir, *small]) == 0
    assert main(["train", "--workdir", workdir]) == 0  # nothing is left to do
    assert main(["train", "--workdir", workdir, "--phases.0.steps", "5"]) == 0
    assert find_checkpoint(workdir).step == 5
    steps = [row["step"] for row in read_metrics(workdir) if "train/loss" in row]
    assert steps == sorted(set(steps))


def test_what_cannot_be_resumed_is_said(capsys, tmp_path):
    assert refused(capsys, "train").endswith(
        "CONFIG is missing; name a config file, or the --workdir of a run to resume"
    )
    write_corpus(tmp_path / "text.txt")
    assert str(tmp_path) in refused(capsys, "train", "--workdir", str(tmp_path))
    assert "there is no config file no_config" in refused(
        capsys, "train", "no_config", "--workdir", str(tmp_path)
    )
