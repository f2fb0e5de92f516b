"""What launch/slurm.sh does after its tasks have ended, with fake srun and scontrol."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sh"
TOOLS = {
    "srun": """
echo "${@:2}" >> steps
echo "${SRUN_CPUS_PER_TASK:-unset}" > cpus
exit "$(cat code)"
""",
    "scontrol": 'echo "$@" >> requeued',
    "scancel": "true",
}


@pytest.fixture
def end(tmp_path):
    """Runs the script once, its tasks ending with the given code."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)

    def run(
        code: int,
        *,
        restarts: int = 0,
        preflight: str = "0",
        arguments: tuple[str, ...] = ("bert_tiny", "--workdir", "run"),
    ):
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "requeued").write_text("")
        done = subprocess.run(
            ["bash", SCRIPT, *arguments],
            cwd=tmp_path,
            env=os.environ
            | {"PATH": f"{tools}:{os.environ['PATH']}", "PREFLIGHT": preflight, "MAX_RESTARTS": "2"}
            | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code
        return (tmp_path / "requeued").read_text() == "requeue 7\n", done.stderr

    return run


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "unset"),
        ({"SLURM_CPUS_PER_TASK": "12"}, "12"),
        ({"SLURM_CPUS_PER_TASK": "12", "SRUN_CPUS_PER_TASK": "6"}, "6"),
    ],
)
def test_tasks_get_the_cpus_of_the_job(end, tmp_path, monkeypatch, given, told):
    for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    end(0)
    assert (tmp_path / "cpus").read_text() == f"{told}\n"


@pytest.mark.parametrize("config", [("bert_tiny",), ()])
def test_the_nodes_are_checked_with_the_config_or_without_one(end, tmp_path, config):
    arguments = (*config, "--workdir", "run")
    end(0, preflight="1", arguments=arguments)
    checked, trained = (tmp_path / "steps").read_text().splitlines()
    assert checked == " ".join(
        ("flax-transformers", "doctor", *(("--config", *arguments) if config else ()))
    )
    assert trained == " ".join(("flax-transformers", "train", *arguments))


def test_preemptions_do_not_use_up_the_restarts_of_failures(end):
    assert end(42, restarts=100) == (True, "")
    assert end(75) == (True, "")
    assert end(42) == (True, "")
    assert end(1) == (True, "")
    assert end(42) == (True, "")
    assert end(75) == (False, "gave up after 3 failures; submit the job again to resume\n")


def test_a_failure_that_cannot_be_counted_is_not_requeued(end, tmp_path):
    (tmp_path / ".slurm-failures-7").mkdir()
    requeued, said = end(75)
    assert not requeued and "Is a directory" in said


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_is_done_or_a_user_error_is_not_requeued(end, tmp_path, code):
    assert end(75) == (True, "")
    assert end(code) == (False, "")
    assert not list(tmp_path.glob(".slurm-failures*"))
