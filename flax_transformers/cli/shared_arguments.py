"""Arguments that several commands have."""

from __future__ import annotations

import argparse

MODEL_HELP = (
    "a workdir or a checkpoint step; or a Hugging Face directory, or an id in its local cache"
)


def add_architecture(parser: argparse.ArgumentParser, source: str, example: str) -> None:
    """``--architecture``, for commands that read a Hugging Face directory named ``source``."""
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help=f"read {source} as this class of Hugging Face, such as {example} (default: what "
        f"{source} says)",
    )
