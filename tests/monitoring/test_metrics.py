"""metrics.jsonl, TensorBoard events and means over steps."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from flax_transformers.errors import UserError
from flax_transformers.monitoring.file_sinks import JsonLines, TensorBoard
from flax_transformers.monitoring.metrics import Accumulator, json_text, read_metrics


def write_run(workdir, steps, **options):
    with JsonLines(workdir, **options) as rows, TensorBoard(workdir, **options) as events:
        for step in steps:
            for sink in (rows, events):
                sink.write(step, {"train/loss": 10.0 - step})


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir)}


def events(workdir):
    """(step, {tag: value} or "restart") of every event below the workdir, in order."""
    found = []
    for file in sorted((Path(workdir) / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log"):
                found.append((event.step, "restart"))
            elif event.HasField("summary"):
                found.append((event.step, {v.tag: v.simple_value for v in event.summary.value}))
    return found


def test_a_row_is_one_line_of_json_with_step_time_and_short_numbers(tmp_path):
    with JsonLines(tmp_path) as writer:
        writer.write(
            20, {"train/loss": np.float32(6.1), "perf/tokens": 123456789012, "eval/reward": 1e60}
        )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert 1.7e9 < row.pop("time") < 1e10
    assert row == {"step": 20, "train/loss": 6.1, "perf/tokens": 123456789012, "eval/reward": None}
    assert '"train/loss": 6.1,' in line


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    with JsonLines(tmp_path, flush_seconds=1e9) as writer:
        writer.write(1, {"train/loss": 9.0})
        assert losses(tmp_path) == {1: 9.0}


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    for kind in (JsonLines, TensorBoard):
        with kind(tmp_path) as sink:
            sink.write(1, {"a": math.nan, "b": math.inf, "c": np.float32(-np.inf), "d": 1.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, 1.5)
    assert math.isnan(read_metrics(tmp_path)[0]["a"])
    ((_, values),) = [event for event in events(tmp_path) if event[1] != "restart"]
    assert math.isnan(values["a"])
    assert values["b"] == math.inf


def test_json_for_other_programs_has_null_for_numbers_that_are_not_finite():
    value = {"step": 2, "é": math.nan, "of": [1.5, (-math.inf, np.float64("nan"), True, None)]}
    text = json_text(value, ensure_ascii=False)
    assert text == '{"step": 2, "é": null, "of": [1.5, [null, null, true, null]]}'


def test_a_resumed_run_drops_what_lies_beyond_its_step(tmp_path):
    write_run(tmp_path, range(1, 8))
    write_run(tmp_path, range(5, 10), start_step=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 10))


def test_a_run_that_starts_anew_drops_every_older_row(tmp_path):
    write_run(tmp_path, [0, 1, 2])
    write_run(tmp_path, [0, 1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_torn_last_line_is_ignored_by_readers_and_removed_by_the_next_run(tmp_path):
    write_run(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 3, "train/lo', b"\0\0\0", b'{"step": 3, "x": "\xc3', b'{"step": 3}'):
        path.write_bytes(whole + torn)
        assert losses(tmp_path) == {1: 9.0, 2: 8.0}
    write_run(tmp_path, [4], start_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 4]


def test_no_metrics_file_reads_as_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_every_scalar_and_hides_what_a_restart_repeats(tmp_path):
    write_run(tmp_path, [1, 2, 3])
    write_run(tmp_path, [2, 3], start_step=1)
    loss = [(step, {"train/loss": 10.0 - step}) for step in (1, 2, 3)]
    assert events(tmp_path) == [(0, "restart"), *loss, (2, "restart"), *loss[1:]]


def test_sinks_that_are_given_to_a_second_training_go_on(tmp_path):
    sinks = JsonLines(tmp_path), TensorBoard(tmp_path)
    for step in (1, 2):
        for sink in sinks:
            with sink:
                sink.write(step, {"train/loss": 10.0 - step})
    assert losses(tmp_path) == {1: 9.0, 2: 8.0}
    rows = [event for event in events(tmp_path) if event[1] != "restart"]
    assert rows == [(1, {"train/loss": 9.0}), (2, {"train/loss": 8.0})]


@pytest.mark.parametrize("kind", [JsonLines, TensorBoard])
def test_a_sink_that_cannot_be_opened_again_is_one_sentence(kind, tmp_path):
    sink = kind(tmp_path / "run")
    with sink:
        sink.write(1, {"train/loss": 9.0})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="metrics cannot be written"), sink:
        pass


def test_flush_brings_tensorboard_up_to_date(tmp_path):
    with TensorBoard(tmp_path, flush_seconds=1e9) as writer:
        writer.write(1, {"train/loss": 9.0})
        writer.flush()
        assert events(tmp_path)[-1] == (1, {"train/loss": 9.0})


def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics cannot be written to .*file/run/metrics\.jsonl"):
        JsonLines(tmp_path / "file" / "run")


class FullDisk(io.StringIO):
    """A file on a full disk: like a real one, it fails once more when it is closed."""

    def flush(self):
        raise OSError(28, "No space left on device")

    def close(self):
        super().close()
        self.flush()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_open(tmp_path):
    writer = JsonLines(tmp_path)
    writer._file.close()
    writer._file = full = FullDisk()
    with pytest.raises(UserError, match=r"No space left on device.*free space"), writer:
        writer.write(1, {"train/loss": 9.0})
    assert full.closed


@pytest.fixture
def bucket(tmp_path):
    """gs:// paths kept in a local folder that, like a bucket, cannot append or rename."""

    def local(path):
        return str(tmp_path) + "/" + str(path).split("//", 1)[1]

    def opener(original, path, mode):
        assert "a" not in mode
        return original(local(path), mode)

    def passed(original, path, **options):
        return original(local(path), **options)

    with epath.testing.mock_epath(open=opener, exists=passed, makedirs=passed, mkdir=passed):
        yield tmp_path / "bucket"


def test_in_a_bucket_files_are_replaced_whole_and_resume_like_local_ones(bucket):
    write_run("gs://bucket/run", range(1, 8))
    write_run("gs://bucket/run", range(5, 8), start_step=4)
    assert [row["step"] for row in read_metrics("gs://bucket/run")] == list(range(1, 8))
    assert [step for step, _ in events(bucket / "run")] == [0, *range(1, 8), 5, *range(5, 8)]


def test_in_a_bucket_rows_wait_for_the_next_flush(bucket):
    with JsonLines("gs://bucket/run", flush_seconds=1e9) as writer:
        writer.write(1, {"train/loss": 9.0})
        assert losses("gs://bucket/run") == {}
        writer.flush()
        assert losses("gs://bucket/run") == {1: 9.0}


def test_means_weigh_steps_by_what_they_count():
    accumulator = Accumulator()
    accumulator.add({"accuracy": (jnp.float32(1), jnp.int32(1)), "loss": (2.0, 4)})
    accumulator.add({"accuracy": (jnp.float32(2), jnp.int32(9)), "loss": (np.float32(4), 8)})
    assert accumulator.means() == {"accuracy": 0.3, "loss": 0.5}


def test_a_metric_that_counted_nothing_has_no_mean():
    accumulator = Accumulator()
    accumulator.add({"accuracy": (0.0, 0), "loss": (1.0, 2)})
    assert accumulator.means() == {"loss": 0.5}


def test_sums_over_many_steps_keep_their_precision():
    accumulator = Accumulator()
    for _ in range(1000):
        accumulator.add({"loss": (np.float32(16_777_217.0), np.float32(16_777_216.0))})
    accumulator.add({"loss": (1000.0, 0)})
    assert accumulator.means()["loss"] == 1 + 1 / 16_777_216


def test_after_a_reset_the_next_interval_starts_from_nothing():
    accumulator = Accumulator()
    accumulator.add({"loss": (5.0, 1)})
    accumulator.reset()
    assert accumulator.means() == {}
    accumulator.add({"loss": (1.0, 1)})
    assert accumulator.means() == {"loss": 1.0}
