"""``flax-transformers COMMAND ...``: parse, call, print. Exit codes: 0 done, 2 the user can mend
it, 42 stopped on request after saving, 75 another process of the job was lost, or it was stuck."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flax_transformers.errors import UserError
from flax_transformers.parallel.distributed import leave_if_not_alone
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.ranges import check_text

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def program(arguments: Sequence[str] | None = None) -> int:
    """``main``, for a process that ends with it: the watchdog limits how long that takes."""
    try:
        return main(arguments)
    finally:
        watchdog.enter("exit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a UserError becomes one line on stderr."""
    # Worker processes and C++ libraries talk too much by default.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("flax_transformers").setLevel(logging.INFO)
    try:
        known, rest = _parser().parse_known_args(arguments)
        _check_texts(known, rest)
        known.tokens = list(sys.argv[1:] if arguments is None else arguments)
        return known.run(known, rest) or 0
    except UserError as error:
        print(f"flax-transformers: {error}", file=sys.stderr)
        leave_if_not_alone(USER_ERROR)
        return USER_ERROR
    except KeyboardInterrupt:
        print("flax-transformers: interrupted; the same command begins again", file=sys.stderr)
        leave_if_not_alone(INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (nothing to close at exit)
        leave_if_not_alone(BROKEN_PIPE)
        return BROKEN_PIPE


class _Parser(argparse.ArgumentParser):
    """One whose errors become one sentence, as all of the user's."""

    def error(self, message: str) -> NoReturn:
        # What `ranges.argument` says names the option itself.
        said = re.sub(r"^argument [^:]*: (?=--)", "", message)
        raise UserError(f"{said}; see {self.prog} --help")


_POSITIONAL = frozenset({"checkpoint", "source", "target"})

_MAY_BE_EMPTY = frozenset({"prompt", "text"})
"""Options for a text. All others with a string name a file, a folder or the like."""


def _check_texts(known: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raises UserError for arguments that no file can be called."""
    for name, value in vars(known).items():
        option = name.upper() if name in _POSITIONAL else f"--{name.replace('_', '-')}"
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, (str, Path)):
                check_text(option, str(text))
            if text == "" and name not in _MAY_BE_EMPTY:
                raise UserError(f"{option} is empty; give it a value, or leave it out")
    for text in rest:
        check_text("an argument", text)


def _parser() -> argparse.ArgumentParser:
    # Imported here, so that a spawned data worker that imports this module stays light.
    from flax_transformers.cli import (
        convert,
        doctor,
        evaluate,
        fill_mask,
        generate,
        inspect,
        plan,
        prepare,
        train,
    )

    parser = _Parser(prog="flax-transformers", description="Pretrain transformers in JAX/Flax.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (train, prepare, evaluate, generate, fill_mask, convert, inspect, plan, doctor):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(program())
