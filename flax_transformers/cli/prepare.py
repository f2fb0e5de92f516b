"""Train the tokenizer and write the token store of a config, ahead of training."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flax_transformers.errors import UserError

if TYPE_CHECKING:
    from flax_transformers.data.base import Compare
    from flax_transformers.data.config import DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file such as configs/bert_base.py")
    parser.add_argument("--output", help="folder or bucket of the store (default: data.store)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--begin",
        action="store_true",
        help="only what --shard jobs need: the tokenizer, and which documents repeat others",
    )
    part.add_argument(
        "--shard",
        metavar="I/N",
        help="only the share of job I of N, from 0, such as $SLURM_ARRAY_TASK_ID/100; the job that "
        "ends last finishes the store, and so does the command without --shard",
    )
    part.add_argument(
        "--verify",
        action="store_true",
        help="read every byte of a finished store, and of its text where that is still there",
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from flax_transformers.cli.config_file import load_config
    from flax_transformers.parallel.watchdog import watchdog

    config = load_config(arguments.config, overrides)
    watchdog.start(config.limits)
    with watchdog.phase("prepare"):
        return _prepare(arguments, config.data)


def _prepare(arguments: argparse.Namespace, data: DataConfig) -> int:
    from flax_transformers.data import dataset

    if arguments.verify:
        data = replace(data, verify=False)  # everything is read below, once
    if arguments.begin:
        dataset.begin(data, arguments.output)
        print("begun; now every --shard job can run, and in the end the command without --shard")
        return 0
    if arguments.shard is not None:
        job, jobs = _job(arguments.shard)
        prepared = dataset.prepare_share(data, arguments.output, job, jobs)
        if prepared is None:
            print(f"share {job}/{jobs} is done, others are not yet")
            return 0
    else:
        compare: Compare = "content" if arguments.verify else "sizes"
        prepared = dataset.prepare(data, arguments.output, compare=compare)
    if arguments.verify:
        prepared.verify()
        print("every file is as it was written")
    print(prepared.summary)
    print(f"store: {prepared.directory}")
    return 0


def _job(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(
            f"--shard {text} is no job; give its number from 0 and how many there are, 0/8 to 7/8"
        )
    return int(match[1]), int(match[2])
