"""The same command in one process or several: the same losses, scores and examples."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.main import main
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.testing import relative_difference, write_corpus

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "bert_tiny.py"
STEPS = 10
DEVICES = 4
"""In all, however many processes share them."""


def arguments(folder, workdir, steps):
    """``train`` with dropout on and unequal rows, small enough for seconds."""
    settings = {
        "data.source.path": folder / "text.txt",
        "data.store": folder / "store",
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.lowercase": False,
        "data.validation-fraction": 0.2,
        "model.vocab-size": 262,
        "model.hidden-size": 32,
        "model.intermediate-size": 64,
        "model.dropout": 0.1,
        "objective.cross-documents": False,
        "phases.0.steps": steps,
        "phases.0.sequence-length": 32,
        "phases.0.batch-size": 16,
        "evaluation.batch-size": 16,
        "optimizer.schedule.kind": "constant",
        "optimizer.schedule.warmup-steps": 1,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "logging.every-steps": 1,
        "logging.example_log": True,
        "logging.tensorboard": False,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["train", str(TINY), "--workdir", str(workdir), *flags]


def run(folder, workdir, processes, steps=STEPS):
    """Runs the command in so many processes to its end."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), str(processes)]
    options = ["--devices", str(DEVICES // processes), "--max-restarts", "0", "--"]
    ended = subprocess.run(
        [*launcher, *options, *arguments(folder, workdir, steps)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout


DIVERGING = """
import sys
from flax_transformers.cli.main import main
from flax_transformers.testing import batches_with_nan
from flax_transformers.training import resume
resume.batches_on_mesh = batches_with_nan(range(5, 9))
sys.exit(main(sys.argv[1:]))
"""


def run_diverging(folder, workdir, processes):
    """Runs the command with batches 5 to 8 of the stream NaN, of which two may be skipped, and a
    rollback; what the processes said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--max-consecutive-skips", "2", "--max-rollbacks", "1", "--checkpoints.every-steps"]
    command = [*arguments(folder, workdir, STEPS), *options, "2", "--evaluation.every-steps", "0"]
    started = []
    for index in range(processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", DIVERGING, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, said
    return said


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


def examples(workdir):
    """The example ids of each step, over all processes."""
    steps = {}
    for file in workdir.glob("ledger-*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], []).extend(row["ids"])
    return {step: sorted(ids) for step, ids in steps.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_corpus(folder / "text.txt", documents=30)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """What one process did, this one, which also leaves the store that several need."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:DEVICES]
        patch.setattr(jax, "devices", lambda *platform: devices)
        assert main(arguments(folder, folder / "run-1", STEPS)) == 0
    return folder / "run-1"


@pytest.fixture(scope="module")
def two(folder, one):
    run(folder, folder / "run-2", 2)
    return folder / "run-2"


def assert_losses_agree(workdir, one):
    assert len(losses(workdir)) == len(losses(one)) == STEPS
    assert relative_difference(losses(workdir), losses(one)) < 1e-5


def test_two_processes_have_the_losses_of_one(one, two):
    assert_losses_agree(two, one)


def test_two_processes_have_the_held_out_score_of_one(one, two):
    """Of rows that fill no whole number of batches, so that the last one is ragged."""
    scores = [
        [row["eval/loss"] for row in read_metrics(workdir) if "eval/loss" in row]
        for workdir in (one, two)
    ]
    assert len(scores[0]) == 1
    assert relative_difference(scores[1], scores[0]) < 1e-5


def test_two_processes_share_the_examples_of_one(one, two):
    assert examples(two) == examples(one)
    assert len(list(two.glob("ledger-*.jsonl"))) == 2


@pytest.mark.full
def test_four_processes_have_the_losses_of_one(folder, one):
    run(folder, folder / "run-4", 4)
    assert_losses_agree(folder / "run-4", one)


@pytest.mark.full
def test_two_processes_roll_back_together_as_one_does(folder, one):
    """Batches 5, 6 and 7 are skipped, batch 8 once more after the rollback to step 4."""
    said = run_diverging(folder, folder / "back-1", 1) + run_diverging(folder, folder / "back-2", 2)
    assert all("rolled back to step 4; the " in text for text in said)
    alone, together = folder / "back-1", folder / "back-2"
    rows = [
        [row["step"] for row in read_metrics(w) if "train/loss" in row] for w in (alone, together)
    ]
    assert rows[0] == rows[1] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert relative_difference(losses(together), losses(alone)) < 1e-5
    assert examples(together) == examples(alone)
    assert find_checkpoint(together).meta["position"] == find_checkpoint(alone).meta["position"]
    assert find_checkpoint(together).meta["position"]["rollbacks"] == 1


@pytest.mark.full
def test_a_run_goes_on_in_any_number_of_processes(folder, one):
    """Each takes its rows of the same batches, and its parts of the same checkpoint."""
    for processes, steps in ((4, 3), (2, 5), (1, 8), (4, STEPS)):
        run(folder, folder / "elastic", processes, steps)
    assert_losses_agree(folder / "elastic", one)
    assert examples(folder / "elastic") == examples(one)
