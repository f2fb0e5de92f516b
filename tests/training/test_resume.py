"""A run that is killed and started again is, to the last bit, the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flax_transformers.checkpointing import manager
from flax_transformers.testing import assert_bit_equal, write_corpus
from tests.training import interrupted_run
from tests.training.interrupted_run import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

SCRIPT = Path(interrupted_run.__file__)


def killed(folder, workdir, stop):
    """The exit code of a run in a process of its own that ends itself."""
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, str(SCRIPT), str(folder), str(workdir), str(stop)]
    return subprocess.run(command, env=environment, timeout=300, check=False).returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "text.txt", documents=20)
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    assert run(folder, folder / "straight").step == 20
    return folder / "straight"


def everything(workdir):
    """All arrays of the newest checkpoint: parameters, optimizer state, key, counters."""
    found = manager.find_checkpoint(workdir)
    assert found.step == 20
    return manager.restore_arrays(found)


def examples(workdir):
    lines = (workdir / "ledger-0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(workdir, straight):
    assert_bit_equal(everything(workdir), everything(straight))
    assert examples(workdir) == examples(straight)
    assert [row["step"] for row in examples(workdir)] == list(range(1, 21))


def test_killed_after_nine_steps_it_repeats_two_and_ends_equal(folder, straight):
    workdir = folder / "killed"
    assert killed(folder, workdir, 9) == -signal.SIGKILL
    assert manager.find_checkpoint(workdir).step == 7
    run(folder, workdir)
    assert_same_run(workdir, straight)


def test_told_to_stop_it_saves_and_ends_equal(folder, straight):
    workdir = folder / "stopped"
    assert run(folder, workdir, 9, signal.SIGTERM).preempted
    assert manager.find_checkpoint(workdir).step == 9
    run(folder, workdir)
    assert_same_run(workdir, straight)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(folder, straight, caplog):
    workdir = folder / "damaged"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    newest = workdir / "checkpoints" / "14"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (workdir / "checkpoints" / "99").mkdir()
    run(folder, workdir)
    assert "set aside as invalid-14-0" in caplog.text
    assert "set aside as invalid-99-0" in caplog.text
    assert (workdir / "checkpoints" / "invalid-14-0").is_dir()
    assert_same_run(workdir, straight)
