"""Nothing that a run writes beside its checkpoints can stop a restart, however damaged it is."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from flax_transformers.checkpointing.manager import find_checkpoint
from flax_transformers.cli.main import main
from flax_transformers.data.dataset import prepare
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.evaluation import saved_baselines
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.monitoring.example_log import ExampleLog
from flax_transformers.monitoring.file_sinks import JsonLines, TensorBoard
from flax_transformers.monitoring.goodput import KINDS, Clock
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.storage.workdir import (
    clear_side_files,
    read_side_file,
    workdir_lock,
    write_text,
)
from flax_transformers.testing import tiny_config, write_corpus
from flax_transformers.training.loop import train_prepared
from tests.multi_process.test_training import arguments

STEPS, RESUMED_AT = 20, 10


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def truncate(path, rng):
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])


def delete(path, rng):
    path.unlink()


def become_a_folder(path, rng):
    path.unlink()
    path.mkdir()
    (path / "stray").write_text("")


def become_unreadable(path, rng):
    """In a way that stops root too."""
    path.unlink()
    path.symlink_to(path.name)


def become_noise(path, rng):
    path.write_bytes(rng.randbytes(200) + b"\n" + rng.randbytes(50))


DAMAGES = (flip, flip, flip, truncate, delete, become_a_folder, become_unreadable, become_noise)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All side files of a run of 20 steps."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    with JsonLines(workdir) as writer:
        for step in range(1, STEPS + 1):
            spent = {f"goodput/{kind}_s": 1.5 * step for kind in KINDS}
            writer.write(step, {"train/loss": 6.0 - step / 10, "perf/goodput": 0.5} | spent)
    with ExampleLog(workdir, 0) as log:
        for step in range(1, STEPS + 1):
            log.write(step, np.arange(4) + step)
    shutil.copy(workdir / "ledger-0.jsonl", workdir / "ledger-1.jsonl")
    row = vars(Baseline("unigram", "eval/loss", 5.25, 100, "tokens")) | {"of": "this"}
    row |= {"checksum": saved_baselines._checksum(row)}
    write_text(workdir / "baselines.json", json.dumps([row], indent=1))
    write_text(workdir / "config.json", '{"seed": 0}')
    write_text(workdir / ".lock", "nobody\n")
    write_text(workdir / "metrics.jsonl.tmp", "left by a kill\n")
    for name in ("tokenizer", "samples", "plots", "tensorboard"):
        write_text(workdir / name / "file", "contents\n")
    return Path(workdir)


def restart(workdir):
    """All that a start reads and writes there. Returns the rows kept."""
    with workdir_lock(workdir):
        clear_side_files(workdir)
        saved = saved_baselines._saved(read_side_file(workdir / "baselines.json") or "", "this")
        assert [one.score for one in saved] in ([], [5.25])
        Clock().resume(read_metrics(workdir), RESUMED_AT)
        for name in ("config.json", "baselines.json", "samples/step_00000010.txt"):
            write_text(workdir / name, "{}")
        for kind in (JsonLines, TensorBoard):
            with kind(workdir, RESUMED_AT) as writer:
                writer.write(RESUMED_AT + 1, {"train/loss": 5.0})
        with ExampleLog(workdir, RESUMED_AT) as log:
            log.write(RESUMED_AT + 1, np.arange(4))
    lines = (workdir / "ledger-0.jsonl").read_text().splitlines()
    return read_metrics(workdir), [json.loads(line) for line in lines]


@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_random_damages_stop_no_reader_and_cost_no_more_than_they_hit(
    written, tmp_path, seed
):
    rng = random.Random(seed)
    files = sorted(path for path in written.rglob("*") if path.is_file())
    assert len(files) == 11
    for number in range(25):
        workdir = tmp_path / str(number)
        shutil.copytree(written, workdir, symlinks=True)
        damage, hit = rng.choice(DAMAGES), rng.choice(files)
        damage(workdir / hit.relative_to(written), rng)
        rows, log = restart(epath.Path(workdir))
        where = f"{damage.__name__} of {hit.name}, number {number}"
        assert rows[-1]["step"] == log[-1]["step"] == RESUMED_AT + 1, where
        hits = {"metrics.jsonl": rows, "ledger-0.jsonl": log}
        for name, found in hits.items():
            # A bit can hit one line, or join it with the next.
            kept = 11 if hit.name != name else 9 if damage is flip else 1
            assert len(found) >= kept, where


def test_a_folder_that_became_a_file_is_set_aside(written, tmp_path, caplog):
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(written, workdir)
    for name in ("samples", "tensorboard", "plots", "tokenizer"):
        shutil.rmtree(workdir / name)
        (workdir / name).write_text("no folder")
    restart(workdir)
    for name in ("samples", "tensorboard", "plots", "tokenizer"):
        assert f"{name} is not a folder: set aside as {name}.unusable-0" in caplog.text
        assert (workdir / f"{name}.unusable-0").read_text() == "no folder"


def test_what_is_left_out_is_said_once_with_its_number(written, tmp_path, caplog):
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(written, workdir)
    for name in ("metrics.jsonl", "ledger-0.jsonl"):
        lines = (workdir / name).read_text().splitlines()
        lines[3], lines[5] = "\0\0", '{"step": "six"}'
        (workdir / name).write_text("\n".join(lines) + "\n" + '{"step": 21, "a kill')
    rows, log = restart(workdir)
    steps = [1, 2, 3, 5, 7, 8, 9, 10, 11]
    assert [row["step"] for row in rows] == [row["step"] for row in log] == steps
    assert [m.rpartition("/")[2] for m in caplog.messages] == [
        "metrics.jsonl: 2 line(s) cannot be read and are left out",
        "ledger-0.jsonl: 2 line(s) cannot be read and are left out",
    ]


@pytest.mark.parametrize(
    "value",
    ['"6.1"', "[1]", "{}", "true", "1" + "0" * 400, "[" * 5000, "1" * 5000],
    ids=["text", "list", "record", "boolean", "huge", "deep", "long"],
)
def test_a_row_that_holds_no_numbers_is_left_out(tmp_path, value):
    good = '{"step": 1, "train/loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(good + f'{{"step": 2, "train/loss": {value}}}\n' + good)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 1]


def test_rows_that_miss_a_part_of_the_time_spent_do_not_count(tmp_path):
    whole = {"step": 3, "time": 100.0} | {f"goodput/{kind}_s": 2.0 for kind in KINDS}
    clock = Clock(now=lambda: 110.0)
    for missing in ("time", "goodput/compile_s"):
        row = {name: value for name, value in whole.items() if name != missing}
        clock.resume([row | {"step": 4}, whole | {"step": 5, "time": float("nan")}], 9)
        assert clock.row()["goodput/steps_s"] == 0.0
    clock.resume([whole], 9)
    assert clock.row()["goodput/steps_s"] == 2.0


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The train command for a workdir, after a run of four steps by it; and that run."""
    folder = tmp_path_factory.mktemp("command")
    write_corpus(folder / "text.txt", documents=30)

    def run(workdir, steps=4):
        small = ["--mesh.fsdp", "4", "--evaluation.every-steps", "0"]
        return main([*arguments(folder, workdir, steps), *small])

    assert run(folder / "run") == 0
    return run, folder / "run"


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    "damage", [flip, truncate, become_a_folder, become_unreadable, become_noise]
)
def test_a_restart_trains_on_beside_any_side_file(command, tmp_path, damage):
    run, finished = command
    rng = random.Random(damage.__name__)
    shutil.copytree(finished, tmp_path / "run")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    hit = [p for p in files if "checkpoints" not in p.relative_to(tmp_path / "run").parts]
    assert {"metrics.jsonl", "ledger-0.jsonl", "baselines.json", "config.json", ".lock"} <= {
        path.name for path in hit
    }
    for path in hit:
        if path.stat().st_size or damage not in (flip, truncate):
            damage(path, rng)
    assert run(tmp_path / "run", steps=5) == 0
    assert find_checkpoint(tmp_path / "run").step == 5


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_damaged_tokenizer_of_the_workdir_reaches_no_checkpoint(tmp_path):
    write_corpus(tmp_path / "text.txt", documents=20)
    config = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=3)
    train_prepared(config, prepare(config.data), tmp_path / "run")
    tokenizer = tmp_path / "run" / "tokenizer"
    original = {p.name: p.read_bytes() for p in tokenizer.iterdir()}
    for path in tokenizer.iterdir():
        become_a_folder(path, None)
    longer = tiny_config(tmp_path / "text.txt", tmp_path / "store", steps=5)
    train_prepared(longer, prepare(longer.data), tmp_path / "run")
    for folder in (find_checkpoint(tmp_path / "run").folder, tmp_path / "run"):
        assert {p.name: p.read_bytes() for p in (folder / "tokenizer").iterdir()} == original
        assert load_tokenizer(folder / "tokenizer").kind == "bytes"
    assert os.path.isdir(tmp_path / "run" / "tokenizer.unusable-0")
