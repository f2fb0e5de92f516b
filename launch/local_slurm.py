"""Test ``launch/slurm.sh`` on a SLURM cluster of two nodes, both on this machine.

    python launch/local_slurm.py

Starts munged, slurmctld and two slurmd in a temporary folder, trains a tiny BERT on both nodes and
checks that: both tasks start; after preemption by a job of higher priority, after a killed task and
after the time limit, the job resumes from its newest checkpoint; it completes; and a user error is
not retried. Prints each stage and exits with 1 at the first one that does not happen. All processes
are ended and the folder is removed at the end (``--keep FOLDER`` keeps the logs in FOLDER).

Requires Linux, the programs of Debian's slurm-wlm and munge (tested as root, with 22.05), and this
package in the Python that runs it. Needs no systemd and does not affect an existing SLURM.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
TIMEOUT_SECONDS = 300.0
"""Time limit of one stage."""
POLL_SECONDS = 0.2

CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until the credentials of its last start expire (default: 2 minutes).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=normal Nodes=node[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=node[1-2] PriorityTier=2 PreemptMode=OFF
"""


class StageError(Exception):
    """A stage did not happen."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def wait_for(what: str, check: Callable[[], object], timeout: float = TIMEOUT_SECONDS) -> None:
    """Waits until ``check`` is true and prints ``what``; raises StageError after ``timeout``."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            raise StageError(what)
        time.sleep(POLL_SECONDS)
    say(what)


# The cluster


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def run(*command: str) -> str:
    """The standard output of a SLURM command."""
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise StageError(f"{shlex.join(command)} failed: {ended.stderr.strip()}")
    return ended.stdout


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A cluster of two idle nodes, which SLURM's commands find through ``SLURM_CONF``."""
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder, host=socket.gethostname(), user=getpass.getuser(), ports=free_ports(3)
        )
    )
    os.environ["SLURM_CONF"] = str(configuration)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munge = ["munged", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--{what}-file={folder}/munged.{what}" for what in ("log", "pid", "seed")]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(start(munge, folder))
        wait_for("munged answers", (folder / "munge.socket").exists, 30)
        daemons.append(start(["slurmctld", "-D"], folder))
        for node in ("node1", "node2"):
            (folder / f"spool-{node}").mkdir()
            daemons.append(start(["slurmd", "-D", "-N", node], folder))
        wait_for("slurmctld has two idle nodes", has_two_idle_nodes, 60)
        yield
    finally:
        with contextlib.suppress(StageError):
            run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            run("scancel", "--user", getpass.getuser())
            wait_for("no job is left", lambda: run("squeue", "--noheader") == "", 60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        say("the cluster is shut down")


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / f"{command[0]}.out", "ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


def has_two_idle_nodes() -> bool:
    with contextlib.suppress(StageError):  # not answering yet
        return run("sinfo", "--noheader", "-p", "normal", "-o", "%D %T") == "2 idle\n"
    return False


# The job


class Job:
    """A training run submitted to SLURM."""

    def __init__(self, folder: Path, name: str, config: str, *flags: str) -> None:
        self.log = folder / f"{name}.log"
        self._workdir = folder / name
        script = [str(ROOT / "launch" / "slurm.sh"), config, "--workdir", str(self._workdir)]
        options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={self.log}"]
        self.id = run("sbatch", *options, *script, *flags).strip()
        say(f"job {self.id}: sbatch {shlex.join(options[1:3])} launch/slurm.sh {config} ...")

    def fields(self) -> dict[str, str]:
        """The fields that ``scontrol show job`` prints."""
        return dict(re.findall(r"(\w+)=(\S+)", run("scontrol", "show", "job", self.id)))

    def has(self, **fields: str) -> bool:
        return fields.items() <= self.fields().items()

    def minutes(self) -> int:
        """Whole minutes since its last start."""
        hours, minutes, _ = self.fields()["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def has_logged(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()

    def since(self, restarts: int) -> str:
        """The log from this restart on."""
        return self.log.read_text().partition(f" after {restarts - 1} restart(s)\n")[2]

    def code(self, restarts: int) -> int | None:
        """Exit code of slurm.sh after so many restarts; None while it runs."""
        text = self.log.read_text() if self.log.exists() else ""
        found = re.search(rf"^exit code (\d+) after {restarts} restart", text, re.MULTILINE)
        return int(found[1]) if found else None

    def step(self) -> int:
        """The newest step in the metrics; 0 if there is none."""
        file = self._workdir / "metrics.jsonl"
        lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved(self) -> list[int]:
        """The sorted steps of its checkpoints."""
        return sorted(int(f.name) for f in self._workdir.glob("checkpoints/*") if f.name.isdigit())

    def task(self, index: int) -> int | None:
        """The process id of task ``index`` >= 1 (0 is also the batch script's), or None."""
        wanted = {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={index}"}
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((folder / "environ").read_text(errors="replace").split("\0")):
                    stat = (folder / "stat").read_text()
                    parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        return next((process for process in parents if parents[process] not in parents), None)

    def kill_task(self, index: int) -> None:
        process = self.task(index)
        if process is None:
            raise StageError(f"  task {index} has a process")
        os.kill(process, signal.SIGKILL)
        say(f"  kill -9 of task {index}")


CONFIG = "configs/bert_tiny.py"


def settings(folder: Path, steps: int) -> list[str]:
    """Flags for a model whose steps take milliseconds."""
    fields: dict[str, object] = {
        "data.source.path": folder / "text.txt",
        "data.store": folder / "store",
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.lowercase": False,
        "data.validation-fraction": 0.2,
        "model.vocab-size": 262,
        "model.hidden-size": 32,
        "model.intermediate-size": 64,
        "objective.cross-documents": False,
        "phases.0.steps": steps,
        "phases.0.sequence-length": 32,
        "phases.0.batch-size": 16,
        "checkpoints.every-steps": 10,
        "evaluation.every-steps": 0,
        "evaluation.batch-size": 16,
        "mesh.data": 2,
        "logging.every-steps": 5,
        "logging.tensorboard": False,
    }
    return [part for key, value in fields.items() for part in (f"--{key}", str(value))]


def prepare(folder: Path) -> None:
    """Prepares the data and sets the environment of slurm.sh."""
    sentences = [f"The number {i} follows {i - 1} and is not {7 * i}." for i in range(2000)]
    documents = [" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    program = folder / "flax-transformers"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m flax_transformers "$@"\n')
    program.chmod(0o755)
    os.environ |= {
        "FLAX_TRANSFORMERS": str(program),
        "MAX_RESTARTS": "2",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        # The node names cannot be resolved.
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}",
    }
    run(str(program), "prepare", CONFIG, *settings(folder, steps=1))
    say("the data is prepared")


def check_started(job: Job) -> None:
    wait_for("  both nodes run the job", lambda: job.has(JobState="RUNNING", NodeList="node[1-2]"))
    wait_for(
        "  both tasks joined", lambda: job.has_logged("2 device(s) of kind cpu in 2 process(es)")
    )
    wait_for("  the preflight check passed", lambda: job.has_logged("ready to train"))
    wait_for("  it trains", lambda: job.step() > 0)


def check_resumed(job: Job, restarts: int) -> None:
    """Checks that a restart resumes from the newest checkpoint."""
    newest = job.saved()[-1]
    wait_for(f"  requeued: Restarts={restarts}", lambda: job.has(Restarts=str(restarts)))
    again = f"resuming from step {newest}"
    wait_for(f"  it resumes from step {newest}", lambda: again in job.since(restarts))
    wait_for("  and trains", lambda: "loss" in job.since(restarts).partition(again)[2])


def kill_one_task(job: Job, restarts: int) -> None:
    job.kill_task(1)
    not_a_failure = (None, 0, 2, 42)
    wait_for(
        "  the other task was ended and the job failed",
        lambda: job.code(restarts) not in not_a_failure,
    )
    say(f"  exit code {job.code(restarts)}")


def test_preemption(folder: Path) -> None:
    job = Job(folder, "preempted", CONFIG, *settings(folder, steps=500))
    check_started(job)
    urgent = ["--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null"]
    number = run("sbatch", *urgent, "--wrap=sleep 3").strip()
    say(f"job {number}: sbatch {shlex.join(urgent[1:3])}, of higher priority")
    wait_for("  preempted: saved, exit code 42", lambda: job.code(0) == 42)
    check_resumed(job, restarts=1)
    wait_for("  completed", lambda: job.has(JobState="COMPLETED", ExitCode="0:0"))


def test_time_limit_and_lost_tasks(folder: Path) -> None:
    job = Job(folder, "lost", CONFIG, *settings(folder, steps=10**6))
    wait_for("  the preflight starts", lambda: job.task(1) is not None)
    kill_one_task(job, restarts=0)
    wait_for("  requeued: Restarts=1", lambda: job.has(Restarts="1"))
    check_started(job)

    minutes = job.minutes() + 2  # SLURM checks limits twice a minute
    run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    say(f"  its time limit is now {minutes} minutes, less than two minutes away")
    wait_for("  signalled before the limit: saved, exit code 42", lambda: job.code(1) == 42)
    run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    check_resumed(job, restarts=2)

    kill_one_task(job, restarts=2)
    check_resumed(job, restarts=3)

    kill_one_task(job, restarts=3)
    # Of the three restarts, that at the time limit does not count.
    wait_for("  MAX_RESTARTS reached: FAILED", lambda: job.has(JobState="FAILED", Restarts="3"))
    wait_for("  and the log says so", lambda: job.has_logged("gave up after 3 failures"))


def test_user_error(folder: Path) -> None:
    job = Job(folder, "mistaken", "configs/absent.py")
    ended = {"JobState": "FAILED", "ExitCode": "2:0", "Restarts": "0"}
    wait_for("  a user error is not retried: FAILED with exit code 2", lambda: job.has(**ended))


def main() -> int:
    parser = argparse.ArgumentParser(description="Test launch/slurm.sh on this machine.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder for all logs")
    arguments = parser.parse_args()
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        say(
            f"{', '.join(absent)} not found; install slurm-wlm and munge (names of Debian packages)"
        )
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # runs the clean-up
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return test_all(arguments.keep.resolve())
    with tempfile.TemporaryDirectory(prefix="local-slurm-") as folder:
        return test_all(Path(folder))


def test_all(folder: Path) -> int:
    folder.chmod(0o755)  # munged requires a socket that all users can reach
    try:
        prepare(folder)
        with cluster(folder):
            test_preemption(folder)
            test_time_limit_and_lost_tasks(folder)
            test_user_error(folder)
    except StageError as stage:
        say(f"FAILED: {stage}")
        for log in folder.glob("*.log"):
            print(f"--- last lines of {log.name}", *log.read_text().splitlines()[-20:], sep="\n")
        return 1
    say("all stages passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
