"""``launch/slurm.sh`` on a SLURM cluster of two nodes, both on this machine, put to the test.

    python launch/local_slurm.py

Starts munged, slurmctld and two slurmd in a temporary folder, trains a tiny BERT on both nodes, and
looks for every stage of a job's life: both tasks start; a job of higher priority preempts it; a
task is killed; the time limit comes; after each it goes on from its newest checkpoint, to the end;
and a mistake in the command is not tried again. Says what it sees and exits with 1 at the first
stage that is missing. Everything it starts, and the folder, is gone when it ends (``--keep FOLDER``
leaves the logs in one of yours).

Assumes Linux, the programs of Debian's slurm-wlm and munge (run as root, with 22.05), and this
package in the Python that runs it. Needs no systemd, and touches no SLURM that is there.
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
PATIENCE = 300.0
"""Seconds until a stage counts as missing."""
POLL_SECONDS = 0.2

CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for the credentials of its last start to expire: 2 minutes by default.
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


class Missing(Exception):
    """A stage that was not seen."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def seen(what: str, check: Callable[[], object], patience: float = PATIENCE) -> None:
    """Waits until ``check`` is true and says so; raises Missing if it does not become true."""
    deadline = time.monotonic() + patience
    while not check():
        if time.monotonic() > deadline:
            raise Missing(what)
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
    """What a command of SLURM prints."""
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise Missing(f"{shlex.join(command)} said: {ended.stderr.strip()}")
    return ended.stdout


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Two nodes that are ready; SLURM's commands find them through ``SLURM_CONF``."""
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
        seen("munged answers", (folder / "munge.socket").exists, 30)
        daemons.append(start(["slurmctld", "-D"], folder))
        for node in ("node1", "node2"):
            (folder / f"spool-{node}").mkdir()
            daemons.append(start(["slurmd", "-D", "-N", node], folder))
        seen("slurmctld has two idle nodes", has_two_idle_nodes, 60)
        yield
    finally:
        with contextlib.suppress(Missing):
            run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            run("scancel", "--user", getpass.getuser())
            seen("no job is left", lambda: run("squeue", "--noheader") == "", 60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        say("the cluster is down")


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / f"{command[0]}.out", "ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


def has_two_idle_nodes() -> bool:
    with contextlib.suppress(Missing):  # it does not answer yet
        return run("sinfo", "--noheader", "-p", "normal", "-o", "%D %T") == "2 idle\n"
    return False


# The job


class Job:
    """A training run that SLURM holds."""

    def __init__(self, folder: Path, name: str, config: str, *flags: str) -> None:
        self.log = folder / f"{name}.log"
        self._workdir = folder / name
        script = [str(ROOT / "launch" / "slurm.sh"), config, "--workdir", str(self._workdir)]
        options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={self.log}"]
        self.id = run("sbatch", *options, *script, *flags).strip()
        say(f"job {self.id}: sbatch {shlex.join(options[1:3])} launch/slurm.sh {config} ...")

    def shown(self) -> dict[str, str]:
        """What ``scontrol`` shows of it."""
        return dict(re.findall(r"(\w+)=(\S+)", run("scontrol", "show", "job", self.id)))

    def has(self, **fields: str) -> bool:
        return fields.items() <= self.shown().items()

    def minutes(self) -> int:
        """Whole ones that it has run since it started last."""
        hours, minutes, _ = self.shown()["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def said(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()

    def since(self, restarts: int) -> str:
        """What stands in the log after the start before that restart has ended."""
        return self.log.read_text().partition(f" after {restarts - 1} restart(s)\n")[2]

    def code(self, restarts: int) -> int | None:
        """What slurm.sh ended with after so many restarts; None before that."""
        text = self.log.read_text() if self.log.exists() else ""
        found = re.search(rf"^exit code (\d+) after {restarts} restart", text, re.MULTILINE)
        return int(found[1]) if found else None

    def step(self) -> int:
        """The newest step that is in the metrics; 0 before there is one."""
        file = self._workdir / "metrics.jsonl"
        lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved(self) -> list[int]:
        """The steps of its checkpoints, in order."""
        return sorted(int(f.name) for f in self._workdir.glob("checkpoints/*") if f.name.isdigit())

    def task(self, index: int) -> int | None:
        """The process of task ``index`` from 1, if it runs (0 is the batch script's number too)."""
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
            raise Missing(f"  a process of task {index}")
        os.kill(process, signal.SIGKILL)
        say(f"  kill -9 of task {index}")


CONFIG = "configs/bert_tiny.py"


def settings(folder: Path, steps: int) -> list[str]:
    """Of a model whose steps take milliseconds."""
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
    """The data, and what slurm.sh takes from the environment."""
    sentences = [f"The number {i} follows {i - 1} and is not {7 * i}." for i in range(2000)]
    documents = [" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    program = folder / "flax-transformers"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m flax_transformers "$@"\n')
    program.chmod(0o755)
    os.environ |= {
        "FLAX_TRANSFORMERS": str(program),
        "MAX_RESTARTS": "3",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        # No name server knows node1.
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}",
    }
    run(str(program), "prepare", CONFIG, *settings(folder, steps=1))
    say("the data is prepared")


def starts(job: Job) -> None:
    seen("  both nodes run it", lambda: job.has(JobState="RUNNING", NodeList="node[1-2]"))
    seen("  both tasks joined", lambda: job.said("2 device(s) of kind cpu in 2 process(es)"))
    seen("  the preflight found all ready", lambda: job.said("ready to train"))
    seen("  it trains", lambda: job.step() > 0)


def goes_on(job: Job, restarts: int) -> None:
    """After that restart it trains from the checkpoint that the start before has left."""
    newest = job.saved()[-1]
    seen(f"  requeued: Restarts={restarts}", lambda: job.has(Restarts=str(restarts)))
    again = f"resuming from step {newest}"
    seen(f"  it goes on from step {newest}", lambda: again in job.since(restarts))
    seen("  and trains", lambda: "loss" in job.since(restarts).partition(again)[2])


def loses_a_task(job: Job, restarts: int) -> None:
    job.kill_task(1)
    fine = (None, 0, 2, 42)
    seen("  the other is ended, and it failed", lambda: job.code(restarts) not in fine)
    say(f"  exit code {job.code(restarts)}")


def preempted_and_finished(folder: Path) -> None:
    job = Job(folder, "preempted", CONFIG, *settings(folder, steps=500))
    starts(job)
    urgent = ["--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null"]
    number = run("sbatch", *urgent, "--wrap=sleep 3").strip()
    say(f"job {number}: sbatch {shlex.join(urgent[1:3])}, of higher priority")
    seen("  preempted: it saved and ended with 42", lambda: job.code(0) == 42)
    goes_on(job, restarts=1)
    seen("  finished: COMPLETED", lambda: job.has(JobState="COMPLETED", ExitCode="0:0"))


def limited_and_lost(folder: Path) -> None:
    job = Job(folder, "lost", CONFIG, *settings(folder, steps=10**6))
    seen("  the preflight starts", lambda: job.task(1) is not None)
    loses_a_task(job, restarts=0)
    seen("  requeued: Restarts=1", lambda: job.has(Restarts="1"))
    starts(job)

    minutes = job.minutes() + 2  # SLURM looks at limits twice a minute
    run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    say(f"  its time limit is now {minutes} minutes, less than two from here")
    seen("  told before the limit: it saved and ended with 42", lambda: job.code(1) == 42)
    run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    goes_on(job, restarts=2)

    loses_a_task(job, restarts=2)
    goes_on(job, restarts=3)

    loses_a_task(job, restarts=3)
    seen("  restarts are bounded: FAILED", lambda: job.has(JobState="FAILED", Restarts="3"))


def mistaken(folder: Path) -> None:
    job = Job(folder, "mistaken", "configs/absent.py")
    ended = {"JobState": "FAILED", "ExitCode": "2:0", "Restarts": "0"}
    seen("  a mistake is not tried again: FAILED with 2", lambda: job.has(**ended))


def main() -> int:
    parser = argparse.ArgumentParser(description="Put launch/slurm.sh to the test on this machine.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty one, for all logs")
    arguments = parser.parse_args()
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        say(f"{', '.join(absent)} not found; install slurm-wlm and munge (as Debian calls them)")
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that all is cleaned up
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return put_to_the_test(arguments.keep.resolve())
    with tempfile.TemporaryDirectory(prefix="local-slurm-") as folder:
        return put_to_the_test(Path(folder))


def put_to_the_test(folder: Path) -> int:
    folder.chmod(0o755)  # munged wants its socket to be reachable by all
    try:
        prepare(folder)
        with cluster(folder):
            preempted_and_finished(folder)
            limited_and_lost(folder)
            mistaken(folder)
    except Missing as stage:
        say(f"MISSING: {stage}")
        for log in folder.glob("*.log"):
            print(f"--- the end of {log.name}", *log.read_text().splitlines()[-20:], sep="\n")
        return 1
    say("every stage was seen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
