"""The jobs of the campaign: tiny runs in processes forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from hooks import HOOKS

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = {1: 400, 2: 60}, {1: 10, 2: 3}
"""By number of processes: two of them, on few cores, take longer for a step."""
HEARTBEAT_SECONDS = 5
PATIENCE_SECONDS = 30.0
"""Time for all processes to end after a fault."""
PRELOAD = [
    f"flax_transformers.{name}"
    for name in ("cli.train", "cli.config_file", "run", "evaluation.report", "evaluation.tasks",
                 "training.loop", "families.bert", "monitoring.plots", "testing")
]  # fmt: skip


class Job:
    """The processes of one attempt of the training command."""

    def __init__(
        self,
        folder: Path,
        workdir: Path,
        processes: int,
        hooks: dict[str, str] | None = None,
        options: dict[str, object] | None = None,
    ) -> None:
        self.log = folder / "attempt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for index in range(processes):
            environment = {"FLAX_TRANSFORMERS_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS)}
            environment |= hooks or {}
            if processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index),
                }
            self.processes.append(
                multiprocessing.Process(
                    target=run_command,
                    args=(
                        training(folder, workdir, processes, options),
                        environment,
                        f"{self.log}-{index}.txt",
                    ),
                )
            )
            Path(f"{self.log}-{index}.txt").write_text("")
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float, besides: int | None = None) -> float:
        """Waits until all but the process ``besides`` have ended; returns the seconds this took."""
        start = time.monotonic()
        for index, process in enumerate(self.processes):
            if index != besides:
                process.join(max(0.0, start + seconds - time.monotonic()))
        return time.monotonic() - start

    def died(self, index: int) -> bool:
        """Whether a process was ended by a signal that it had no handler for; waits for its end."""
        self.processes[index].join(PATIENCE_SECONDS)
        return (self.processes[index].exitcode or 0) < 0

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()

    def said(self) -> str:
        return "".join(
            Path(f"{self.log}-{index}.txt").read_text(errors="replace")
            for index in range(len(self.processes))
        )

    def resumed_from(self) -> int | None:
        found = re.search(r"resuming from step (\d+)", self.said())
        return int(found.group(1)) if found else None


def training(
    folder: Path, workdir: Path, processes: int, options: dict[str, object] | None = None
) -> list[str]:
    """The command: a very small model on generated text."""
    return ["train", *settings(folder, processes, options), "--workdir", str(workdir)]


def prepare(folder: Path) -> None:
    """Prepares the text, which a job of several processes requires."""
    log = folder / "prepare.txt"
    process = multiprocessing.Process(
        target=run_command, args=(["prepare", *settings(folder, 1)], {}, str(log))
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the text could not be prepared: {log.read_text()}")


def settings(folder: Path, processes: int, options: dict[str, object] | None = None) -> list[str]:
    """A config and the fields that are changed."""
    changes: dict[str, object] = {
        "data.source.path": folder / "text.txt",
        "data.store": folder / "store",
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.lowercase": False,
        "data.validation-fraction": 0.1,
        "model.vocab-size": 262,
        "model.hidden-size": 16,
        "model.num-heads": 2,
        "model.num-layers": 1,
        "model.intermediate-size": 16,
        "model.dropout": 0.1,
        "phases.0.steps": STEPS[processes],
        "phases.0.sequence-length": 16,
        "phases.0.batch-size": 4,
        "optimizer.schedule.warmup-steps": 10,
        "evaluation.batch-size": 16,
        "evaluation.max-examples": 16,
        "evaluation.every-steps": 0,
        "checkpoints.every-steps": SAVE_EVERY[processes],
        "logging.example_log": True,
        "logging.tensorboard": False,
    }
    changes |= options or {}
    flags = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return [str(ROOT / "configs" / "bert_tiny.py"), *flags]


def run_command(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In a forked process: runs ``python -m flax_transformers``, from start to exit code."""
    import atexit

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    from flax_transformers.cli.main import program

    for name, install in HOOKS.items():
        if name in os.environ:
            install(os.environ[name])
    try:
        code = program(arguments)
        atexit._run_exitfuncs()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    os._exit(code)
