"""Reinforcement learning in one process or two: the same rollouts and losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.testing import relative_difference
from tests.post_training.reinforcement.online_runs import SLOW

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.full]

ROOT = Path(__file__).parents[2]
STEPS = 6  # of which the last two have a second rollout
CONFIG = f"""
import dataclasses
from flax_transformers.parallel.mesh import MeshConfig
from tests.post_training.reinforcement.online_runs import config_for

def get_config():
    config = config_for(steps={STEPS}, kl_coefficient=0.1)
    return dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
"""


def run(folder, workdir, processes):
    """Trains in so many processes, with four devices in all. In a job of several the first reward
    takes half a minute."""
    config = folder / "online.py"
    config.write_text(CONFIG)
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), str(processes)]
    options = ["--devices", str(4 // processes), "--max-restarts", "0", "--"]
    ended = subprocess.run(
        [*launcher, *options, "train", str(config), "--workdir", str(workdir)],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        | {SLOW: "35" if processes > 1 else "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout
    return workdir


def values(workdir, name):
    return [row[name] for row in read_metrics(workdir) if name in row]


def test_two_processes_sample_and_train_as_one_does(tmp_path):
    """The first process scores for both, by a function of the user's."""
    one, two = (run(tmp_path, tmp_path / f"run-{n}", n) for n in (1, 2))
    for step in (0, 4):
        file = Path("rollouts", f"step_{step:08d}.jsonl")
        alone, together = (
            [json.loads(line) for line in (workdir / file).read_text().splitlines()]
            for workdir in (one, two)
        )
        assert len(alone) == 16 and any(row["advantage"] for row in alone)
        for name in ("prompt", "completion", "rewards"):
            assert [row[name] for row in together] == [row[name] for row in alone]
    for name in ("train/loss", "policy/kl", "eval/reward"):
        assert len(values(one, name)) == (1 if name.startswith("eval") else STEPS)
        assert relative_difference(values(two, name), values(one, name)) < 1e-5
