"""A job that is alive but stuck: all its processes end with code 75 and name who held them up."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_transformers.cli.main import main
from flax_transformers.testing import write_corpus

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
CONFIG = f"""
import dataclasses, os, runpy, time
from flax_transformers.objectives.masked_lm import MaskedLM

SEEN = [0]

@dataclasses.dataclass(frozen=True)
class Sleeping(MaskedLM):
    def prepare(self, example, rng, vocab, sequence_length):
        SEEN[0] += 1
        if os.environ.get("STUCK") == os.environ.get("JAX_PROCESS_ID") and SEEN[0] == 41:
            print("asleep", flush=True)
        while os.environ.get("STUCK") == os.environ.get("JAX_PROCESS_ID") and SEEN[0] > 40:
            time.sleep(1)
        return super().prepare(example, rng, vocab, sequence_length)

def get_config():
    config = runpy.run_path({str(ROOT / "configs" / "bert_tiny.py")!r})["get_config"]()
    return dataclasses.replace(config, objective=Sleeping())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stuck")
    write_corpus(folder / "text.txt", documents=30)
    (folder / "stuck.py").write_text(CONFIG)
    assert main(["prepare", *settings(folder)]) == 0
    return folder


def settings(folder):
    fields = {
        "data.source.path": folder / "text.txt",
        "data.store": folder / "store",
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.lowercase": False,
        "model.vocab-size": 262,
        "model.hidden-size": 16,
        "model.num-heads": 2,
        "model.num-layers": 1,
        "model.intermediate-size": 16,
        "phases.0.steps": 100_000,
        "phases.0.sequence-length": 16,
        "phases.0.batch-size": 8,
        "evaluation.every-steps": 0,
        "logging.every-steps": 1,
        "logging.tensorboard": False,
    }
    return [str(folder / "stuck.py")] + [
        part for name, value in fields.items() for part in (f"--{name}", str(value))
    ]


class Job:
    """Processes of one ``train``, of which some may never be started."""

    def __init__(self, folder, workdir, processes, *options, absent=(), stuck=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes, self._logs = {}, {}
        command = ["train", *settings(folder), "--workdir", str(workdir), *options]
        for index in range(processes):
            if index in absent:
                continue
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
                "PYTHONPATH": str(ROOT),
            }
            if stuck is not None:
                environment["STUCK"] = str(stuck)
            self._logs[index] = folder / f"{workdir.name}-{index}.log"
            with open(self._logs[index], "w") as log:
                self.processes[index] = subprocess.Popen(
                    [sys.executable, "-m", "flax_transformers", *command],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def said(self, index):
        return self._logs[index].read_text()

    def wait_for(self, text, index, seconds=240):
        """Until process ``index`` has said so."""
        deadline = time.monotonic() + seconds
        while text not in self.said(index):
            assert time.monotonic() < deadline, {i: self.said(i)[-2000:] for i in self.processes}
            assert all(p.poll() is None for p in self.processes.values()), self.said(0)[-2000:]
            time.sleep(0.1)

    def codes(self, seconds):
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            process.wait(max(1, deadline - time.monotonic()))
        return [process.returncode for process in self.processes.values()]


@pytest.fixture
def start(folder, tmp_path):
    jobs = []

    def begin(*arguments, **how):
        jobs.append(Job(folder, tmp_path / "run", *arguments, **how))
        return jobs[-1]

    yield begin
    for job in jobs:
        for process in job.processes.values():
            process.kill()
            process.wait()


@pytest.mark.full  # tests/parallel/test_watchdog.py has processes that wait for one of them
def test_a_process_that_sleeps_in_data_loading_ends_the_job_and_is_named(start):
    job = start(2, "--limits.data-s", "5", stuck=1)
    job.wait_for("asleep", 1)
    assert job.codes(90) == [75, 75]
    for index in (0, 1):
        said = job.said(index)
        assert "process 1 of 2 has been in the phase 'data' (waiting for the next batch)" in said
        assert "limits.data_s = 5" in said
        assert "most recent call first" in said
    assert "in prepare" in job.said(1)


@pytest.mark.full
def test_a_process_that_waits_in_a_step_names_the_one_in_data_loading(start):
    job = start(2, "--limits.step-s", "8", stuck=1)
    job.wait_for("asleep", 1)
    assert job.codes(90) == [75, 75]
    for index in (0, 1):
        assert "it waits for process 1, which has been in the phase 'data'" in job.said(index)


@pytest.mark.full
@pytest.mark.parametrize("told", [0, 1])
def test_a_hanging_job_ends_within_its_grace_after_a_signal(start, told):
    job = start(2, "--limits.grace-s", "3", stuck=1)
    job.wait_for("asleep", 1)
    time.sleep(1)
    job.processes[told].send_signal(signal.SIGTERM)
    assert job.codes(60) == [75, 75]
    for index in (0, 1):
        assert f"process {told} of 2 was told to stop (SIGTERM)" in job.said(index)


@pytest.mark.full
def test_a_job_that_saves_after_a_signal_exits_with_42(start):
    job = start(2, "--limits.grace-s", "30")
    job.wait_for("step ", 0)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes(120) == [42, 42]


@pytest.mark.full
@pytest.mark.parametrize("absent", [0, 1])
def test_a_missing_process_ends_the_waiting_ones(start, absent):
    job = start(2, "--limits.start-s", "5", absent=[absent])
    assert job.codes(90) == [75]
    said = job.said(1 - absent)
    assert "JAX_COORDINATOR_ADDRESS" in said and "JAX_NUM_PROCESSES" in said
    assert f"process {1 - absent} of 2 stopped waiting after" in said
    if absent == 1:
        assert "1 of 2 processes joined at 127.0.0.1:" in said
    else:
        assert "process 0 of 2 does not answer at 127.0.0.1:" in said
