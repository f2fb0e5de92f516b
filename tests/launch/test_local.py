"""How ``launch/local.py`` reacts to the exit codes of its processes, tested with small scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multi_process

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"

FAKE_MODULE = """
import os, pathlib, signal, subprocess, sys, time
index = int(os.environ.get("JAX_PROCESS_ID", "0"))
started = pathlib.Path(f"started-{index}")
attempt = len(started.read_text().split()) if started.exists() else 0
with open(started, "a") as file:
    file.write(f"{os.getpid()} ")

def sleep():
    print("ready", flush=True)
    time.sleep(60)

def saves(number, frame):
    raise SystemExit(42)

"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher on a fake package whose processes run ``body``."""
    (tmp_path / "flax_transformers").mkdir()
    (tmp_path / "flax_transformers" / "__init__.py").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTHONPATH"))}

    def launched(body, *options, processes=2):
        main = tmp_path / "flax_transformers" / "__main__.py"
        main.write_text(FAKE_MODULE + body)
        command = [sys.executable, str(LAUNCHER), str(processes), *options, "--", "train", "it"]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return launched


def attempts(folder, index=0):
    return len((folder / f"started-{index}").read_text().split())


def is_running(pid):
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_none_left(folder):
    pids = [int(pid) for file in folder.glob("started-*") for pid in file.read_text().split()]
    assert pids
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []


def test_every_process_has_its_index_and_a_log(launch, tmp_path):
    body = """
print(index, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"][:10],
      os.environ["JAX_NUM_CPU_DEVICES"], *sys.argv[1:])
"""
    job = launch(body, "--devices", "3", "--logs", "logs")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    lines = [f"{i} 2 127.0.0.1: 3 train it" for i in range(2)]
    assert sorted(out.splitlines()) == [f"[{i}] {line}" for i, line in enumerate(lines)]
    for index, line in enumerate(lines):
        assert (tmp_path / "logs" / f"process-{index}.log").read_text() == line + "\n"


def test_each_process_uses_the_gpu_of_its_number(launch):
    body = 'print(index, os.environ.get("JAX_LOCAL_DEVICE_IDS"))'
    out, _ = launch(body).communicate(timeout=60)
    assert sorted(out.splitlines()) == ["[0] 0 0", "[1] 1 1"]
    out, _ = launch(body, processes=1).communicate(timeout=60)
    assert out == "0 None\n"


def test_a_single_process_gets_no_coordinator_address(launch):
    job = launch('print("JAX_COORDINATOR_ADDRESS" in os.environ)', processes=1)
    assert job.communicate(timeout=60)[0] == "False\n"


def test_if_one_process_is_killed_both_are_restarted(launch, tmp_path):
    body = """
if attempt == 0 and index == 1:
    while not pathlib.Path("started-0").exists():  # the other one must know its attempt
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    sleep()
"""
    job = launch(body)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "failed: process 1 by signal 9 (Killed)" in out
    assert "exit codes [-15, -9]; restart 1 of 10 in 1 s" in out
    assert (attempts(tmp_path, 0), attempts(tmp_path, 1)) == (2, 2)


def test_restarts_are_limited_and_the_last_exit_code_is_returned(launch, tmp_path):
    job = launch("sys.exit(75)", "--max-restarts", "1", processes=1)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 75
    assert "gave up after 1 restart(s)" in out
    assert attempts(tmp_path) == 2


def test_a_process_that_hangs_after_the_others_are_done_is_killed(launch, tmp_path):
    body = """
if attempt == 0 and index == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
"""
    job = launch(body, "--save-seconds", "1", "--grace-seconds", "1")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "exit codes [0, -9]; restart 1 of 10" in out
    assert_none_left(tmp_path)


def test_a_user_error_is_not_retried(launch, tmp_path):
    # Both processes run when one exits with 2; the other one would fail later with 75.
    both = "while not pathlib.Path(f'started-{1 - index}').exists(): time.sleep(0.05)\n"
    job = launch(f"{both}if index: sys.exit(2)\ntime.sleep(10)\nsys.exit(75)")
    job.communicate(timeout=60)
    assert job.returncode == 2
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize(("options", "code", "tries"), [((), 42, 1), (("--requeue",), 0, 2)])
def test_a_preempted_job_ends_or_is_requeued(launch, tmp_path, options, code, tries):
    job = launch("sys.exit(0 if attempt else 42)", *options)
    job.communicate(timeout=60)
    assert (job.returncode, attempts(tmp_path)) == (code, tries)


def test_preemptions_do_not_use_up_the_restarts_of_failures(launch, tmp_path):
    body = "sys.exit([42, 42, 75, 42, 0][attempt])"
    job = launch(body, "--requeue", "--max-restarts", "1", processes=1)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, attempts(tmp_path)) == (0, 5)
    assert out.count("restart after a preemption") == 3
    assert "exit codes [75]; restart 1 of 1 in 1 s" in out


def test_a_request_to_stop_reaches_all_processes_and_is_not_a_failure(launch, tmp_path):
    # Process 1 has no handler for SIGTERM yet.
    job = launch("if index == 0:\n    signal.signal(signal.SIGTERM, saves)\nsleep()")
    ready = [job.stdout.readline() for _ in range(2)]
    assert len(ready) == 2
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 42
    assert_none_left(tmp_path)


def test_a_process_that_ignores_sigterm_is_killed(launch, tmp_path):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if index == 1:
    while not pathlib.Path("started-0").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    sys.exit(1)
sleep()
"""
    job = launch(body, "--grace-seconds", "0.3", "--max-restarts", "0")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 137
    assert "exit codes [-9, 1]" in out
    assert_none_left(tmp_path)


def test_a_killed_launcher_leaves_no_process(launch, tmp_path):
    job = launch("sleep()")
    ready = sorted(job.stdout.readline() for _ in range(2))
    assert ready == ["[0] ready\n", "[1] ready\n"]
    job.kill()
    job.wait(timeout=60)
    assert_none_left(tmp_path)


def test_child_processes_end_with_their_parent(launch, tmp_path):
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(f"started-child-{index}").write_text(str(child.pid))
"""
    job = launch(body)
    job.communicate(timeout=60)
    assert job.returncode == 0
    assert_none_left(tmp_path)
