"""Train the tokenizer and write the token store of a config, ahead of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file such as configs/bert_base.py")
    parser.add_argument("--output", help="folder or bucket of the store (default: data.store)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from flax_transformers.cli.config_file import load_config
    from flax_transformers.data.prepare import prepare_text

    config = load_config(arguments.config, overrides)
    prepared = prepare_text(config.data, arguments.output)
    for store in filter(None, (prepared.train, prepared.validation)):
        print(
            f"{store.split}: {store.num_documents:,} documents, {store.num_sentences:,} sentences, "
            f"{store.num_tokens:,} tokens"
        )
    vocabulary = prepared.tokenizer.vocabulary
    print(f"tokenizer: {prepared.tokenizer.kind}, {vocabulary.size:,} pieces")
    print(f"store: {prepared.train.directory}")
    return 0
