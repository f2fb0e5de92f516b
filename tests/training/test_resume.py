"""A run that is killed and started again is, to the last bit, the run that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flax_transformers.checkpointing import manager
from flax_transformers.testing import assert_bit_equal, write_corpus

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("interrupted_run.py")


def run(folder, workdir, stop=20, signal_name=None):
    command = [sys.executable, str(SCRIPT), str(folder), str(workdir), str(stop)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    return subprocess.run(
        command + ([signal_name] if signal_name else []),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "text.txt", documents=20)
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    finished = run(folder, folder / "straight")
    assert finished.returncode == 0, finished.stderr
    return folder / "straight"


def everything(workdir):
    """All arrays of the newest checkpoint: parameters, optimizer state, key, counters."""
    found = manager.find_checkpoint(workdir)
    assert found.step == 20
    return manager.restore_arrays(found)


def ledger(workdir):
    lines = (workdir / "ledger-0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(workdir, straight):
    assert_bit_equal(everything(workdir), everything(straight))
    assert ledger(workdir) == ledger(straight)
    assert [row["step"] for row in ledger(workdir)] == list(range(1, 21))


def test_killed_after_nine_steps_it_repeats_two_and_ends_equal(folder, straight):
    workdir = folder / "killed"
    killed = run(folder, workdir, 9, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert manager.find_checkpoint(workdir).step == 7
    resumed = run(folder, workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(workdir, straight)


def test_told_to_stop_it_saves_and_ends_equal(folder, straight):
    workdir = folder / "stopped"
    stopped = run(folder, workdir, 9, "SIGTERM")
    assert stopped.returncode == 42, stopped.stderr
    assert manager.find_checkpoint(workdir).step == 9
    assert run(folder, workdir).returncode == 0
    assert_same_run(workdir, straight)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(folder, straight):
    workdir = folder / "damaged"
    assert run(folder, workdir, 16, "SIGKILL").returncode == -signal.SIGKILL
    newest = workdir / "checkpoints" / "14"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (workdir / "checkpoints" / "99").mkdir()
    resumed = run(folder, workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "set aside as invalid-14-0" in resumed.stderr
    assert "set aside as invalid-99-0" in resumed.stderr
    assert (workdir / "checkpoints" / "invalid-14-0").is_dir()
    assert_same_run(workdir, straight)
