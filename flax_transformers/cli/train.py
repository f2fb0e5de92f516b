"""Train a model, from the newest checkpoint in the workdir if there is one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flax_transformers.errors import UserError
from flax_transformers.ranges import parse_integer

if TYPE_CHECKING:  # the command line answers --help without waiting for jax
    from flax_transformers.training.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a file such as configs/bert_tiny.py; without it, the run in the workdir is resumed",
    )
    parser.add_argument("--workdir", help="folder or bucket for all that the run writes")
    parser.add_argument(
        "--print-config", action="store_true", help="show the resolved config and stop"
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps, into profile/ of the workdir (TensorBoard, xprof, Perfetto)",
    )
    parser.add_argument(
        "--dump-hlo", metavar="DIR", help="write the text of the step there, lowered and compiled"
    )
    parser.epilog = "Any field of the config can be set, as in --optimizer.learning-rate 3e-4."


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from flax_transformers.config_json import to_json

    config = _config(arguments, overrides)
    if arguments.print_config:
        print(json.dumps(to_json(config), indent=2))
        return 0
    if arguments.workdir is None:
        raise UserError("--workdir is missing; name a folder for checkpoints, metrics and plots")
    profile = _steps(arguments.profile)

    from flax_transformers import run as runs
    from flax_transformers.monitoring.profiling import Profiling
    from flax_transformers.parallel.distributed import PREEMPTED

    outcome = runs.train(
        config,
        arguments.workdir,
        overrides=overrides,
        profiling=Profiling(profile, arguments.dump_hlo),
    )
    return PREEMPTED if outcome.preempted else 0


def _config(arguments: argparse.Namespace, overrides: Sequence[str]) -> TrainConfig:
    """That of the file, or else of the run whose newest checkpoint is in the workdir."""
    from flax_transformers.cli.config_file import config_of_run, load_config, override

    name, overrides = _file_and_overrides(arguments, overrides)
    if name is not None:
        return load_config(name, overrides)
    if arguments.workdir is None:
        raise UserError(
            "CONFIG is missing; name a config file, or the --workdir of a run to resume"
        )

    from flax_transformers import runtime
    from flax_transformers.checkpointing.manager import find_checkpoint
    from flax_transformers.checkpointing.step_directories import has_checkpoint
    from flax_transformers.storage.workdir import open_workdir

    runtime.start(None)
    if not has_checkpoint(open_workdir(arguments.workdir)):
        raise UserError(
            f"--workdir {arguments.workdir} holds no checkpoint yet to resume from; name the "
            "CONFIG of the run"
        )
    config = config_of_run(find_checkpoint(arguments.workdir))
    if config is None:
        raise UserError(
            f"--workdir {arguments.workdir} holds converted weights and no run to resume; name a "
            f"CONFIG and another --workdir, and start from the weights with --init-from "
            f"{arguments.workdir}"
        )
    return override(config, overrides)


def _file_and_overrides(
    arguments: argparse.Namespace, overrides: Sequence[str]
) -> tuple[str | None, list[str]]:
    """CONFIG and the config's fields on the command line.

    Where CONFIG is left out, argparse takes the value after the first option that it does not know
    for it; such a value goes back behind its option.
    """
    name, fields = arguments.config, list(overrides)
    if name is None or name.endswith(".py"):
        return name, fields
    before = arguments.tokens[arguments.tokens.index(name) - 1]
    if before not in fields:
        return name, fields
    fields.insert(fields.index(before) + 1, name)
    return None, fields


def _steps(text: str | None) -> tuple[int, int] | None:
    """First and last step of ``FIRST:LAST``."""
    if text is None:
        return None
    first, last = (parse_integer(part) for part in text.partition(":")[::2])
    if first is None or last is None or not 1 <= first <= last:
        raise UserError(
            f"--profile {text} names no steps; give the first and the last, as in 10:15"
        )
    return first, last
