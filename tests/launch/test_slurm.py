"""``launch/slurm.sh`` on a real SLURM, of two nodes on this machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local_slurm.py"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.mark.full
@pytest.mark.multi_process
@pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)), reason="needs Debian's packages slurm-wlm and munge"
)
def test_a_job_is_preempted_loses_tasks_meets_its_limit_and_goes_on_each_time():
    ended = subprocess.run(
        [sys.executable, str(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.endswith("every stage was seen\n")
