"""The preflight of a job: what two processes are told of each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_transformers.data.dataset import prepare
from flax_transformers.testing import tiny_config, write_corpus

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"

CONFIG = """
import os
from flax_transformers.testing import tiny_config
from flax_transformers.parallel.mesh import MeshConfig

def get_config():
    seed = int(os.environ["JAX_PROCESS_ID"]) if {unequal} else 0
    return tiny_config({text!r}, {store!r}, seed=seed, mesh=MeshConfig(data=-1))
"""


@pytest.fixture
def doctor(tmp_path):
    def told(store="store", unequal=False):
        """Exit code and lines of ``doctor --config`` in two processes."""
        text = str(tmp_path / "text.txt")
        written = CONFIG.format(unequal=unequal, text=text, store=str(tmp_path / store))
        (tmp_path / "config.py").write_text(written)
        command = ["doctor", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path)]
        ended = subprocess.run(
            [sys.executable, str(LAUNCHER), "2", "--max-restarts", "0", "--", *command],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return ended.returncode, ended.stdout

    write_corpus(tmp_path / "text.txt")
    prepare(tiny_config(tmp_path / "text.txt", tmp_path / "store").data)
    return told


def test_doctor_reports_the_devices_of_a_job(doctor, tmp_path):
    code, said = doctor()
    assert code == 0, said
    for line in (
        "2 device(s) of kind cpu in 2 process(es), 1 in this one",
        "an all-reduce of 4 MiB over 2 device(s) is right",
        "the config is the same in all processes and fits the devices (data=2)",
        f"every process finds the data in {tmp_path / 'store'}",
        f"{tmp_path} can be written by every process",
        "ready to train",
    ):
        assert f"[0] {line}" in said
    assert not (tmp_path / ".doctor").exists()


def test_unequal_configs_are_refused(doctor):
    code, said = doctor(unequal=True)
    assert code == 2
    assert "the config of process 0 and of 1 differ; give every machine the same file" in said


@pytest.mark.full  # tests/test_runtime.py verifies data in shares, and configs differ above
def test_data_that_one_process_finds_damaged_end_the_job(doctor, tmp_path):
    file = tmp_path / "store" / "train" / "00000.tokens"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    code, said = doctor()
    assert code == 2
    assert said.count("00000.tokens of the token store") == 1  # the other verified other files
    assert "every process finds the data" not in said


@pytest.mark.full
def test_data_that_were_not_prepared_are_missed(doctor):
    code, said = doctor(store="elsewhere")
    assert code == 2
    assert "There is no finished token store" in said
