"""If a data worker is stopped, the run that waits for it ends, and the worker too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

PROGRAM = """
import multiprocessing, os, signal, sys
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.watchdog import watchdog
from tests.data.pipeline.test_loader import stream

if __name__ == "__main__":
    watchdog.start(Limits(data_s=float(sys.argv[1]), grace_s=1))
    watchdog.ignore_signals()
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    watchdog.listen()
    batches = stream(workers=1)
    with watchdog.phase("first_batch"):
        next(batches)
    (worker,) = multiprocessing.active_children()
    print(worker.pid, flush=True)
    os.kill(worker.pid, signal.SIGSTOP)
    while True:
        with watchdog.phase("data"):
            next(batches)
"""


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("told", [False, True])
def test_a_stopped_worker_ends_the_run_at_its_limit_or_within_the_grace(tmp_path, told):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), "300" if told else "2"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        worker = int(process.stdout.readline())
        if told:
            time.sleep(1)
            process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "in the phase 'data' (waiting for the next batch)" in said
    assert ("was told to stop (SIGTERM)" in said) == told
    assert f"{worker} (" in said and "stopped)" in said
    deadline = time.monotonic() + 5
    while is_there(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_there(worker)
