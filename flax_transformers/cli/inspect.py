"""Show prepared training examples as people read them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from flax_transformers.data.tokenizer_kinds import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file such as configs/bert_tiny.py")
    parser.add_argument("--examples", type=int, default=3, help="how many to show")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from rich.console import Console

    from flax_transformers.cli.config_file import load_config
    from flax_transformers.data.pipeline import TextExamples, TrainStream
    from flax_transformers.data.prepare import prepare_text

    config = load_config(arguments.config, overrides)
    prepared = prepare_text(config.data)
    phase = config.phases[0]
    examples = TextExamples(prepared.train, config.objective.window_spec(phase.sequence_length))
    stream = TrainStream(
        examples,
        config.objective,
        prepared.tokenizer.vocabulary,
        sequence_length=phase.sequence_length,
        batch_size=arguments.examples,
        seed=(config.seed, 0),
    )
    with stream:
        batch = next(stream)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{len(examples):,} windows an epoch; rows of {phase.sequence_length}; chosen tokens are "
        "shown as [bold red]shown[/]→[bold green]label[/], padding is left out\n"
    )
    for i in range(arguments.examples):
        row = {name: values[i] for name, values in batch.items()}
        console.print(f"[bold]example {row['example_id']}[/]", _readable(row, prepared.tokenizer))
        shapes = ", ".join(
            f"{name} {values.dtype}{list(values.shape)}" for name, values in row.items()
        )
        console.print(f"[dim]{shapes}[/]\n", markup=True)
    return 0


def _readable(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> Text:
    """The row's pieces, with what was masked beside what has to be predicted, as rich text."""
    labels = {
        int(position): int(label)
        for position, label, weight in zip(
            row["masked_positions"], row["masked_labels"], row["masked_weights"], strict=True
        )
        if weight
    }
    ids = row["input_ids"][: int(row["attention_mask"].sum())]
    text = Text()
    for position, piece in enumerate(tokenizer.pieces(ids)):
        if position in labels:
            text.append(piece, "bold red")
            text.append("→")
            text.append(tokenizer.pieces([labels[position]])[0], "bold green")
        else:
            special = int(ids[position]) in tokenizer.vocabulary.special_ids
            text.append(piece, "dim" if special else "")
        text.append(" ")
    return text
