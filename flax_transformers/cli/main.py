"""``flax-transformers COMMAND ...``: parses the command line, and runs a command.

Exit codes: 0 done, 2 a mistake that the user can fix, 42 stopped on request after saving, 75
another process of the job was lost, or it was stuck, 130 interrupted, 141 nobody reads the output.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import errno
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from flax_transformers.cli import parsing
from flax_transformers.errors import UserError
from flax_transformers.parallel.host_memory import restart_with_memory_settings
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.ranges import check_text
from flax_transformers.version import __version__

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

_DESCRIPTION = (
    "Pretrain, fine-tune and run transformers in JAX and Flax: one core, one trainer, from a "
    "laptop's CPU to TPU pods."
)
_MAY_BE_EMPTY = frozenset({"prompt", "text"})
"""Options for a text. All other strings name a file, a folder or the like."""


def program(arguments: Sequence[str] | None = None) -> int:
    """``main`` for a process that ends with it: the watchdog limits how long the exit takes."""
    _fill_standard_descriptors()
    if arguments is None and sys.argv[1:2] in (["train"], ["sweep"]):
        restart_with_memory_settings()
    # Tracing makes many objects and little garbage; looking for it took a sixth of a short run.
    gc.set_threshold(10_000, 20)
    code = 1  # of an exception
    # The first to be registered is the last to be called: all else that exits has ended well.
    atexit.register(lambda: _end(code))
    try:
        code = main(arguments)
        return code
    except SystemExit as error:  # --help
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        watchdog.enter("exit")


def _fill_standard_descriptors() -> None:
    """Opens those that were closed before the start, as by ``>&-``: a file or a pipe that is opened
    later would get their numbers, and C++ libraries would write their messages into it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _end(code: int) -> None:
    """Ends this process without the destructors of C++ libraries.

    Those of clients of object stores and of collectives abort now and then, as their threads still
    run: a job that was done would be reported as failed, with exit code 134.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or a closed one
            stream.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. A UserError becomes one line on stderr."""
    # Worker processes and C++ libraries are too verbose by default.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("flax_transformers").setLevel(logging.INFO)
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:  # None: it was closed before the start
            sys.stdout.flush()  # here, where a full disk is named
        return code
    except UserError as error:
        print(f"{parsing.PROGRAM}: {error}", file=sys.stderr)
        return _leave(USER_ERROR)
    except KeyboardInterrupt:
        print(f"{parsing.PROGRAM}: interrupted; the same command starts again", file=sys.stderr)
        return _leave(INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (nothing to close at exit)
        return _leave(BROKEN_PIPE)
    except Exception as error:
        explained = _out_of_memory(error) or _out_of_space(error) or _forbidden(error)
        if explained is None:
            raise
        print(f"{parsing.PROGRAM}: {explained}", file=sys.stderr)
        return _leave(USER_ERROR)


def _out_of_memory(error: Exception) -> str | None:
    """What to do about a program that a device has no memory for; None for any other error.

    XLA says so when it compiles a program or when it runs one. Known by name, because importing jax
    is slow.
    """
    if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    first_line = str(error).strip().splitlines()[0]
    return (
        f"a device has too little memory ({first_line:.200}); make batches smaller (batch_size), "
        "or for training set --phases.0.micro-batches higher, --compute.remat full, or --mesh.fsdp "
        "to shard over more devices. flax-transformers plan shows what takes the memory"
    )


def _out_of_space(error: Exception) -> str | None:
    """What to do about a disk that is full, such as that of a file which the output goes to."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    if error.filename is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what is left is not written at exit)
    place = error.filename or "the output of the command"
    return f"{place} cannot be written ({error.strerror}); free some space, and run it again"


def _forbidden(error: Exception) -> str | None:
    """What to do about a file that this user may not use, or that is in such a folder."""
    if not isinstance(error, PermissionError) or error.errno != errno.EACCES:
        return None
    if not isinstance(error.filename, str):  # of no file, or of an open one
        return None
    return (
        f"{error.filename} cannot be used ({error.strerror}); get the permission for it and for "
        "the folders above it, or give another path"
    )


def _leave(code: int) -> int:
    """``code``; in a job of several processes, ends this one at once."""
    if "jax" in sys.modules:  # slow to import, and without it this process is alone
        from flax_transformers.parallel.distributed import leave_if_not_alone

        leave_if_not_alone(code)
    return code


def _run(tokens: list[str]) -> int:
    name = tokens[0] if tokens else ""
    if name == "--version":
        print(f"{parsing.PROGRAM} {__version__}")
        return 0
    kinds = _commands()
    if name in ("-h", "--help"):
        return _parsed(kinds, ["--help"])
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(kinds)}"
        raise UserError(f"there is no command {name!r}; {hint}" if name else f"no command; {hint}")
    kind = kinds[name]
    own, overrides = parsing.split(kind, tokens[1:])
    for text in overrides:
        check_text("an argument", text)
    if "--help" in own and (config := _config_file(kind, own)) is not None:
        from flax_transformers.cli.config_file import load_config

        parsing.show_help(name, kind, load_config(check_text("CONFIG", config)))
        return 0
    command = _parsed(kinds, [name, *own])
    _check_texts(command)
    from flax_transformers.cli.config_file import type_in_current_folder
    from flax_transformers.config_json import types_found_by

    try:
        with types_found_by(type_in_current_folder):
            return command.run(overrides) or 0
    except parsing.UnknownOption as error:
        raise error.among(parsing.option_names(kind)) from None


def _commands() -> dict[str, Any]:
    """The dataclass of each command by name. Their modules import jax only to run."""
    from flax_transformers.cli.chat import Arena, Chat
    from flax_transformers.cli.convert import Convert
    from flax_transformers.cli.doctor import Doctor
    from flax_transformers.cli.evaluate import Evaluate
    from flax_transformers.cli.generate import FillMask, Generate
    from flax_transformers.cli.inspect import Inspect
    from flax_transformers.cli.plan import Plan
    from flax_transformers.cli.predict import Predict
    from flax_transformers.cli.prepare import Prepare
    from flax_transformers.cli.report import Report
    from flax_transformers.cli.sweep import Sweep
    from flax_transformers.cli.train import Train

    return {
        "train": Train,
        "sweep": Sweep,
        "prepare": Prepare,
        "evaluate": Evaluate,
        "predict": Predict,
        "generate": Generate,
        "fill-mask": FillMask,
        "chat": Chat,
        "arena": Arena,
        "convert": Convert,
        "inspect": Inspect,
        "report": Report,
        "plan": Plan,
        "doctor": Doctor,
    }


def _parsed(kinds: dict[str, Any], tokens: list[str]) -> Any:
    summarize = tokens == ["--help"]
    commands = tuple(
        Annotated[
            kind,
            tyro.conf.subcommand(
                name,
                prefix_name=False,
                description=kind.__doc__.partition("\n")[0] if summarize else None,
            ),
        ]
        for name, kind in kinds.items()
    )
    union: Any = Union[commands]  # noqa: UP007
    return parsing.parse_arguments(union, tokens, description=_DESCRIPTION)


def _config_file(kind: type, own: list[str]) -> str | None:
    """The config file among the arguments of a command, as ``--config FILE`` or as the first."""
    names = {field.name: field.type for field in dataclasses.fields(kind)}
    if "config" not in names:
        return None
    if "config" in parsing.option_names(kind):
        after = own.index("--config") + 1 if "--config" in own else len(own)
        return own[after] if after < len(own) else None
    return own[0] if not own[0].startswith("--") else None


def _check_texts(command: Any) -> None:
    """Raises UserError for a string that cannot be the name of a file or the like."""
    options = parsing.option_names(type(command))
    for field in dataclasses.fields(command):
        name, value = field.name.replace("_", "-"), getattr(command, field.name)
        option = f"--{name}" if name in options else name.upper()
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path):
                check_text(option, str(text))
            if text in ("", Path("")) and name not in _MAY_BE_EMPTY:
                raise UserError(f"{option} is empty; give it a value, or leave it out")


if __name__ == "__main__":
    sys.exit(program())
