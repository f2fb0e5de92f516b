"""Processes that take training steps in turn: the side that asks, and the side that answers.

Only the standard library is needed, because processes of another framework import it too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ANSWER = "answer: "
"""Begins the lines that are meant for the other side; libraries print others."""


def serve(step: Callable[[], float], about: dict[str, Any]) -> None:
    """Take two steps to compile, and then as many as each line of the standard input says.

    ``step`` takes one and returns its loss when all its work is done. The first answer is
    ``about`` with the seconds and the loss of the first step, every other one the ``seconds`` of
    the steps and the last ``loss``.
    """
    began = time.perf_counter()
    loss = step()
    first = {"first_seconds": time.perf_counter() - began, "first_loss": loss}
    step()
    _answer(about | first)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        _answer({"seconds": seconds, "loss": loss})


def _answer(content: dict[str, Any]) -> None:
    print(_ANSWER + json.dumps(content), flush=True)


class Failed(Exception):
    """A process ended before it answered; the text is the end of what it wrote."""


class Worker:
    """A process that serves steps; ``about`` is its first answer. It ends with the ``with``."""

    def __init__(self, command: list[str], environment: dict[str, str], errors: Path) -> None:
        self._errors = errors
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.seconds: list[float] = []

    def __enter__(self) -> Worker:
        self.about = self._answered()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its loop ends, and the process with it
        if any(error):
            self._process.kill()
        self._process.wait()

    def take(self, steps: int) -> None:
        """Let the process take one step and then ``steps``, whose times are added to ``seconds``.

        The first one is not counted: while a process waits for its turn, the host of a virtual
        machine takes memory back from it, which never happens in a run.
        """
        assert self._process.stdin is not None
        print(1 + steps, file=self._process.stdin, flush=True)
        answer = self._answered()
        self.seconds += answer["seconds"][1:]
        self.about |= {"last_loss": answer["loss"]}

    def _answered(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return dict(json.loads(line.removeprefix(_ANSWER)))
        self._process.wait()
        raise Failed(self._errors.read_text()[-2000:])
