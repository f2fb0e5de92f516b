"""Workdirs and token stores in buckets, from the command line, against emulators."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from flax_transformers.checkpointing.step_directories import finished_steps
from flax_transformers.cli.main import main
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.storage import locks
from flax_transformers.storage.paths import bucket_path
from flax_transformers.storage.workdir import open_workdir
from flax_transformers.testing import relative_difference, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

ROOT = Path(__file__).parents[2]
TINY, LAUNCHER = str(ROOT / "configs" / "bert_tiny.py"), ROOT / "launch" / "local.py"


@pytest.fixture
def settings(tmp_path, bucket):
    """Overrides for a run of four steps whose store is in the bucket."""
    write_corpus(tmp_path / "text.txt")
    return [
        *("--data.source.path", str(tmp_path / "text.txt"), "--data.store", f"{bucket}/store"),
        *("--data.tokenizer.kind", "bytes", "--data.tokenizer.lowercase", "False"),
        *("--data.validation-fraction", "0.2"),
        *("--model.vocab-size", "262", "--model.hidden-size", "32"),
        *("--model.norm-position", "post", "--model.embedding-norm", "True"),
        *("--model.num-layers", "1", "--model.intermediate-size", "32"),
        *("--phases.0.steps", "4", "--phases.0.sequence-length", "32"),
        *("--phases.0.batch-size", "16", "--evaluation.batch-size", "16"),
        *("--optimizer.schedule.warmup-steps", "1"),
        *("--logging.every-steps", "1", "--logging.example-log", "True"),
        *("--checkpoints.every-steps", "2"),
    ]


def names(folder: epath.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def steps(path: epath.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def damage(file: epath.Path) -> None:
    """Flips one bit of the last byte."""
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def test_a_run_in_a_bucket_is_complete_resumes_and_can_be_used(bucket, settings, tmp_path, capsys):
    assert main(["prepare", TINY, *settings]) == 0
    workdir = open_workdir(f"{bucket}/run")
    train = ["train", TINY, "--workdir", str(workdir), *settings]
    assert main(train) == 0
    assert names(workdir) >= {
        *("config.json", "metrics.jsonl", "ledger-0.jsonl", "baselines.json"),
        *("plots", "samples", "tensorboard", "tokenizer", "checkpoints"),
    }
    assert ".lock" not in names(workdir)
    assert finished_steps(workdir / "checkpoints") == [2, 4]
    assert steps(workdir / "ledger-0.jsonl") == [1, 2, 3, 4]
    before = {row["step"]: row.get("train/loss") for row in read_metrics(workdir)[:3]}

    # One bit of the newest checkpoint is wrong: the run resumes from the previous one.
    damage(workdir / "checkpoints" / "4" / "state" / "manifest.ocdbt")
    assert main([*train, "--phases.0.steps", "6"]) == 0
    assert names(workdir / "checkpoints") == {"2", "4", "6", "invalid-4-0"}
    assert steps(workdir / "ledger-0.jsonl") == [1, 2, 3, 4, 5, 6]
    after = {row["step"]: row.get("train/loss") for row in read_metrics(workdir)}
    assert sorted(after) == [1, 2, 3, 4, 5, 6]
    assert {step: after[step] for step in before} == before

    capsys.readouterr()
    assert main(["evaluate", str(workdir)]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert main(["fill-mask", str(workdir), "--text", "the [MASK] reads"]) == 0
    assert main(["doctor", "--workdir", str(workdir)]) == 0
    assert main(["convert", str(workdir), str(tmp_path / "published")]) == 0
    assert (tmp_path / "published" / "model.safetensors").exists()
    assert (tmp_path / "published" / "tokenizer_config.json").exists()
    again = ["train", TINY, "--workdir", str(tmp_path / "tuned"), *settings]
    assert main([*again, "--init-from", str(workdir), "--phases.0.steps", "1"]) == 0


def test_a_killed_run_resumes_without_losing_or_repeating_examples(bucket, settings, environment):
    workdir = open_workdir(f"{bucket}/run")
    train = ["train", TINY, "--workdir", str(workdir), *settings]
    command = [sys.executable, "-m", "flax_transformers", *train, "--phases.0.steps", "100000"]
    first = subprocess.Popen(command, env=environment)
    try:
        while not finished_steps(workdir / "checkpoints"):
            assert first.poll() is None
            time.sleep(0.1)
    finally:
        first.kill()
        first.wait()
    assert (workdir / ".lock").exists()
    last = finished_steps(workdir / "checkpoints")[-1] + 2
    assert main([*train, "--phases.0.steps", str(last)]) == 0
    assert steps(workdir / "ledger-0.jsonl") == list(range(1, last + 1))
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, last + 1))


def test_two_processes_train_in_a_bucket_as_one_does(bucket, settings, environment, tmp_path):
    settings = [*settings, "--optimizer.schedule.kind", "constant"]
    assert main(["prepare", TINY, *settings]) == 0
    alone, workdir = open_workdir(tmp_path / "alone"), open_workdir(f"{bucket}/run")
    assert main(["train", TINY, "--workdir", str(alone), *settings]) == 0
    two = [sys.executable, str(LAUNCHER), "2", "--devices", "1", "--max-restarts", "0", "--"]
    # The second time they resume from their common checkpoint.
    for last in ("2", "4"):
        train = ["train", TINY, "--workdir", str(workdir), *settings, "--phases.0.steps", last]
        assert subprocess.run([*two, *train], env=environment, timeout=300).returncode == 0
    assert finished_steps(workdir / "checkpoints") == [2, 4]
    assert ".lock" not in names(workdir)
    examples = [ids(workdir / f"ledger-{process}.jsonl") for process in range(2)]
    expected = ids(alone / "ledger-0.jsonl")
    assert {step: sorted(examples[0][step] + examples[1][step]) for step in expected} == expected
    assert examples[0].keys() == examples[1].keys() == expected.keys()
    assert relative_difference(losses(workdir), losses(alone)) < 1e-5


def ids(log: epath.Path) -> dict[int, list[int]]:
    rows = map(json.loads, log.read_text().splitlines())
    return {row["step"]: sorted(row["ids"]) for row in rows}


def losses(workdir: epath.Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


HOLD = """
import sys, time
from flax_transformers.storage.locks import lease
from flax_transformers.storage.paths import bucket_path
with lease(bucket_path(sys.argv[1]), seconds=4):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_bucket_is_left_to_its_owner_until_that_is_killed(bucket, environment):
    command = [sys.executable, "-c", HOLD, bucket]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    folder = bucket_path(bucket)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains in"):
            locks.lease(folder, seconds=4).__enter__()
    finally:
        first.kill()
        first.wait()
    with locks.lease(folder, seconds=4):
        assert names(folder) == {".lock"}
    assert not (folder / ".lock").exists()


def test_a_lock_of_another_machine_that_is_not_renewed_is_taken_over(bucket):
    folder = bucket_path(bucket)
    (folder / ".lock").write_text(json.dumps({"host": "elsewhere", "process": 1, "id": "a"}))
    with locks.lease(folder, seconds=0.5):
        assert json.loads((folder / ".lock").read_text())["id"] != "a"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_is_not_there_is_named(emulators, capsys, scheme):
    assert main(["doctor", "--workdir", f"{scheme}://nosuchbucket/run"]) == 2
    assert f"{scheme}://nosuchbucket/run" in capsys.readouterr().err


def test_other_schemes_are_refused(capsys):
    assert main(["doctor", "--workdir", "az://bucket/run"]) == 2
    assert "az://bucket/run cannot be reached; a workdir is" in capsys.readouterr().err
