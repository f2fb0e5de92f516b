"""What ``launch/local.py`` makes of the ways its processes end, without the weight of real ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multi_process

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"

STAND_IN = """
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
    """Starts the launcher on a stand-in for the package, whose every process runs ``body``."""
    (tmp_path / "flax_transformers").mkdir()
    (tmp_path / "flax_transformers" / "__init__.py").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTHONPATH"))}

    def launched(body, *options, processes=2):
        main = tmp_path / "flax_transformers" / "__main__.py"
        main.write_text(STAND_IN + body)
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
    """Whether it runs; one that has ended and waits to be collected does not."""
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


def test_every_process_is_told_which_it_is_and_has_a_log(launch, tmp_path):
    said = """
print(index, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"][:10],
      os.environ["JAX_NUM_CPU_DEVICES"], *sys.argv[1:])
"""
    job = launch(said, "--devices", "3", "--logs", "logs")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    lines = [f"{i} 2 127.0.0.1: 3 train it" for i in range(2)]
    assert sorted(out.splitlines()) == [f"[{i}] {line}" for i, line in enumerate(lines)]
    for index, line in enumerate(lines):
        assert (tmp_path / "logs" / f"process-{index}.log").read_text() == line + "\n"


def test_one_process_alone_is_no_job(launch):
    job = launch('print("JAX_COORDINATOR_ADDRESS" in os.environ)', processes=1)
    assert job.communicate(timeout=60)[0] == "False\n"


def test_when_one_is_killed_the_other_is_ended_and_both_start_again(launch, tmp_path):
    body = """
if attempt == 0 and index == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    sleep()
"""
    job = launch(body)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "exit codes [-15, -9]; restart 1 of 10 in 1 s" in out
    assert (attempts(tmp_path, 0), attempts(tmp_path, 1)) == (2, 2)


def test_restarts_are_bounded_and_the_last_exit_code_is_told(launch, tmp_path):
    job = launch("sys.exit(75)", "--max-restarts", "1")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 75
    assert "gave up after 1 restart(s)" in out
    assert attempts(tmp_path) == 2


def test_a_process_that_does_not_end_when_the_others_are_done_is_ended(launch, tmp_path):
    body = """
if attempt == 0 and index == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
"""
    job = launch(body, "--save-seconds", "1", "--grace-seconds", "1")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "exit codes [0, -9]; restart 1 of 10" in out
    assert_none_left(tmp_path)


def test_a_mistake_of_the_user_is_not_tried_again(launch, tmp_path):
    # Both run when one makes a mistake; the other would fail later in another way.
    both = "while not pathlib.Path(f'started-{1 - index}').exists(): time.sleep(0.05)\n"
    job = launch(f"{both}if index: sys.exit(2)\ntime.sleep(10)\nsys.exit(75)")
    job.communicate(timeout=60)
    assert job.returncode == 2
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize(("options", "code", "tries"), [((), 42, 1), (("--requeue",), 0, 2)])
def test_a_preempted_job_ends_or_is_started_again(launch, tmp_path, options, code, tries):
    job = launch("sys.exit(0 if attempt else 42)", *options)
    job.communicate(timeout=60)
    assert (job.returncode, attempts(tmp_path)) == (code, tries)


def test_a_request_to_stop_reaches_all_and_is_not_taken_for_a_failure(launch, tmp_path):
    # Process 1 has not come to where it could save.
    job = launch("if index == 0:\n    signal.signal(signal.SIGTERM, saves)\nsleep()")
    ready = [job.stdout.readline() for _ in range(2)]
    assert len(ready) == 2
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 42
    assert_none_left(tmp_path)


def test_who_does_not_end_when_told_is_killed(launch, tmp_path):
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


def test_what_a_process_started_ends_with_it(launch, tmp_path):
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(f"started-child-{index}").write_text(str(child.pid))
"""
    job = launch(body)
    job.communicate(timeout=60)
    assert job.returncode == 0
    assert_none_left(tmp_path)
