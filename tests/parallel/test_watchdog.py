"""A stuck process ends by itself, says why and where; one that makes progress is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from flax_transformers.errors import UserError
from flax_transformers.parallel.limits import PHASES, Limits
from flax_transformers.parallel.watchdog import Watchdog

PRELUDE = """
import ctypes, json, os, re, signal, subprocess, sys, threading, time
from pathlib import Path
from flax_transformers.parallel import watchdog as module
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.watchdog import watchdog

assert "jax" not in sys.modules
lock = ctypes.CDLL(None).pthread_mutex_lock

# Ignored where a shell has started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Folder:
    '''A store that processes of one machine share.'''
    def __init__(self, index, count):
        self.index, self.count, self.root = index, count, Path("store")
    def put(self, folder, value):
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        path = self.root / folder / str(self.index)
        path.with_suffix(".new").write_text(value)
        path.with_suffix(".new").rename(path)
    def values(self, folder):
        found = (self.root / folder).glob("*") if (self.root / folder).exists() else []
        return {int(p.name): p.read_text() for p in found if not p.suffix}

def a_stuck_function():
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # for ever, whatever signals come
"""


@pytest.fixture
def start(tmp_path):
    """Starts a program of its own, which ends with the test."""
    started = []

    def begin(body):
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process, seconds=30):
    """Exit code and what was said."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.multi_process
def test_a_phase_that_takes_longer_than_its_limit_ends_the_process_with_stacks(start):
    code, _, said = ended(
        start("""
        watchdog.start(Limits(data_s=1))
        with watchdog.phase("step"), watchdog.phase("data"):
            a_stuck_function()
        """)
    )
    assert code == 75
    assert "this process has been in the phase 'data' (waiting for the next batch) for" in said
    assert "limits.data_s = 1" in said
    assert "in a_stuck_function" in said and "most recent call first" in said


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_has_a_limit_of_its_own(monkeypatch, phase):
    reasons = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason: reasons.append(reason))
    watchdog = Watchdog()
    watchdog.limits = Limits(**{f"{phase}_s": 0.3})
    watchdog.enter(phase)
    for seconds in (0.2, 0.4):
        watchdog._check(watchdog._current, watchdog._current.since + seconds)
    assert len(reasons) == 1 and f"limits.{phase}_s = 0.3" in reasons[0]


@pytest.mark.multi_process
def test_an_interrupt_that_the_program_has_handled_is_forgotten(start):
    code, out, said = ended(
        start("""
        def interrupted(context):
            try:
                with context:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(5)
            except KeyboardInterrupt:
                print("handled", flush=True)
            time.sleep(1)  # for the thread

        import contextlib
        watchdog.start(Limits(grace_s=1))
        interrupted(watchdog.phase("prepare"))
        interrupted(contextlib.nullcontext())  # as at the prompt of a notebook
        watchdog.start(Limits(grace_s=1))
        with watchdog.phase("prepare"):
            time.sleep(3)
        print("done")
        """)
    )
    assert (code, out) == (0, "handled\nhandled\ndone\n"), said


@pytest.mark.multi_process
def test_progress_and_new_phases_begin_the_time_anew_and_zero_is_no_limit(start):
    code, out, said = ended(
        start("""
        watchdog.start(Limits(data_s=1.5, step_s=1.5, evaluation_s=1.5, save_s=0))
        with watchdog.phase("step"):
            for _ in range(4):
                with watchdog.phase("data"):
                    time.sleep(0.5)
                time.sleep(0.2)
            with watchdog.phase("evaluation"):
                for _ in range(4):
                    time.sleep(0.5)
                    watchdog.progress()
            with watchdog.phase("save"):
                time.sleep(2)
        print("through")
        """)
    )
    assert (code, out, said) == (0, "through\n", "")


@pytest.mark.multi_process
def test_stack_traces_are_printed_once_before_the_limit(start):
    code, out, said = ended(
        start("""
        watchdog.start(Limits(), 0.3)
        with watchdog.phase("step"):
            time.sleep(2)
        with watchdog.phase("compile"):
            time.sleep(1)
        print("through")
        """)
    )
    assert (code, out) == (0, "through\n")
    assert said.count("its stacks:") == 1
    assert said.count("in the phase 'step'") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.multi_process
def test_a_signal_while_the_main_thread_is_blocked_in_c_ends_the_process_within_its_grace(
    start, number
):
    process = start("""
    watchdog.start(Limits(grace_s=1))
    watchdog.ignore_signals()
    for n in (signal.SIGTERM, signal.SIGINT):
        signal.signal(n, lambda number, frame: None)
    watchdog.listen()
    with watchdog.phase("step"):
        print("stuck", flush=True)
        a_stuck_function()
    """)
    assert process.stdout.readline() == "stuck\n"
    before = time.monotonic()
    process.send_signal(number)
    code, _, said = ended(process)
    assert code == 75
    assert time.monotonic() - before < 8
    assert f"was told to stop ({number.name})" in said and "limits.grace_s = 1" in said


@pytest.mark.multi_process
def test_a_process_that_stops_in_time_or_is_saving_is_not_ended(start):
    process = start("""
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    watchdog.start(Limits(grace_s=1))
    with watchdog.phase("save"):
        print("saving", flush=True)
        time.sleep(2)
    with watchdog.phase("step"):
        assert told == [signal.SIGTERM]
        time.sleep(0.5)
        watchdog.acknowledge()
        time.sleep(1.5)
    sys.exit(42)
    """)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    code, _, said = ended(process)
    assert (code, said) == (42, "")


@pytest.mark.multi_process
def test_a_signal_that_is_ignored_is_no_request(start):
    process = start("""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watchdog.start(Limits(grace_s=0.5))
    with watchdog.phase("step"):
        print("on", flush=True)
        time.sleep(2)
    """)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 0


@pytest.mark.multi_process
def test_time_in_which_the_process_was_stopped_does_not_count(start):
    process = start("""
    module.SUSPENDED_SECONDS = 1
    watchdog.start(Limits(step_s=3))
    with watchdog.phase("step"):
        end = time.monotonic() + 5
        print("on", flush=True)  # it may be stopped from here on
        while time.monotonic() < end:
            time.sleep(0.1)
        print("through")
    """)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    code, out, _ = ended(process)
    assert (code, out) == (0, "through\n")


@pytest.mark.multi_process
def test_children_are_named_with_their_state_and_ended_even_if_stopped(start, tmp_path):
    code, out, said = ended(
        start("""
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
        child.start()
        print(child.pid, flush=True)
        os.kill(child.pid, signal.SIGSTOP)
        watchdog.start(Limits(data_s=1))
        with watchdog.phase("data"):
            a_stuck_function()
        """)
    )
    assert code == 75
    pid = int(out)
    assert f"{pid} (" in said and "stopped)" in said
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


TOGETHER = """
watchdog.start(Limits(data_s=2, step_s=60))
watchdog.join(Folder({index}, 3))
Path("here-{index}").touch()
while len(list(Path().glob("here-*"))) < 3:
    time.sleep(0.05)
with watchdog.phase("step"):
    with watchdog.phase("data"):
        if {index} == 1:
            a_stuck_function()
    a_stuck_function()
"""


@pytest.mark.multi_process
def test_all_processes_end_and_name_the_one_that_is_stuck(start):
    processes = [start(TOGETHER.format(index=index)) for index in range(3)]
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [75, 75, 75]
    for index, (_, _, said) in enumerate(results):
        assert "process 1 of 3 has been in the phase 'data'" in said
        assert "all other processes wait for it" in said
        assert "most recent call first" in said
        assert (f"process {index} of 3 was in the phase 'step'" in said) == (index != 1)


@pytest.mark.multi_process
def test_a_process_that_waits_names_the_one_it_waits_for(start):
    """The others' limits are longer than that of the process which waits."""
    body = TOGETHER.replace("data_s=2, step_s=60", "data_s=60, step_s=3")
    processes = [start(body.format(index=index)) for index in range(3)]
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [75, 75, 75]
    for _, _, said in results:
        assert "it waits for process 1, which has been in the phase 'data'" in said


@pytest.mark.multi_process
def test_a_signal_to_one_process_while_another_hangs_ends_all(start):
    body = TOGETHER.replace("data_s=2, step_s=60", "grace_s=1") + "\n"
    body = body.replace(
        'with watchdog.phase("step"):',
        """
watchdog.ignore_signals()
signal.signal(signal.SIGTERM, lambda number, frame: None)
watchdog.listen()
print("on", flush=True)
with watchdog.phase("step"):""",
    )
    processes = [start(body.format(index=index)) for index in range(3)]
    for process in processes:
        process.stdout.readline()
    time.sleep(2.5)
    processes[2].send_signal(signal.SIGTERM)
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [75, 75, 75]
    for _, _, said in results:
        assert "process 2 of 3 was told to stop (SIGTERM)" in said
        assert "it waits for process 1" in said


class SlowPeers:
    """Notes the values that are being put and those that were put."""

    index, count = 0, 2

    def __init__(self):
        self.begun, self.done = [], []

    def put(self, folder, value):
        self.begun.append(value)
        time.sleep(0.5)
        self.done.append(value)

    def values(self, folder):
        return {}


def test_no_exchange_with_other_processes_lasts_longer_than_the_program():
    watchdog, peers = Watchdog(), SlowPeers()
    watchdog.enter("start")
    with watchdog.running(Limits()):
        watchdog.join(peers)
        while not peers.begun:
            time.sleep(0.01)
        watchdog.leave()
        assert peers.done == peers.begun
        begun = len(peers.begun)
        time.sleep(1.7)
        assert len(peers.begun) == begun


@pytest.mark.multi_process
def test_a_signal_to_a_forked_child_is_not_reported_to_its_parent(start):
    code, out, _ = ended(
        start("""
        watchdog.start(Limits(grace_s=0.3))
        with watchdog.phase("step"):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
            time.sleep(0.3)
            os.kill(pid, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            time.sleep(1.5)
        """)
    )
    assert (code, out) == (0, "-15\n")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "10"])
def test_a_limit_is_a_finite_number_of_seconds(value):
    with pytest.raises(UserError, match=r"limits\.data_s is"):
        Limits(data_s=value)


def test_the_limit_of_waiting_for_data_is_below_that_of_a_step():
    assert Limits().data_s < Limits().step_s


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.multi_process
def test_a_signal_without_a_handler_ends_the_process(start, number):
    process = start("""
    watchdog.start(Limits())
    with watchdog.phase("prepare"):
        print("on", flush=True)
        time.sleep(60)
    """)
    process.stdout.readline()
    process.send_signal(number)
    assert ended(process)[0] == -number
