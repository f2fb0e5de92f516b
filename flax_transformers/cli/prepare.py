"""Train the tokenizer and write the token store of a config, ahead of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file such as configs/bert_base.py")
    parser.add_argument("--output", help="folder or bucket of the store (default: data.store)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from flax_transformers.cli.config_file import load_config
    from flax_transformers.data.dataset import prepare

    config = load_config(arguments.config, overrides)
    prepared = prepare(config.data, arguments.output)
    print(prepared.summary)
    print(f"store: {prepared.directory}")
    return 0
