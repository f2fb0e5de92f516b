"""Show prepared training examples as people read them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from flax_transformers.data.tokenizers.kinds import Tokenizer
from flax_transformers.objectives.base import ExampleView
from flax_transformers.ranges import argument, integers

_LEGEND = (
    "[bold green]green[/] has to be predicted, [bold red]shown[/]→[bold green]predicted[/] where "
    "something else stands there, [bold cyan]«n»[/] begins a segment, [bold green]/name[/] is a "
    "class; padding is left out\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file such as configs/bert_tiny.py")
    parser.add_argument(
        "--examples",
        type=argument("--examples", integers(1, 10_000)),
        default=3,
        help="how many to show",
    )
    parser.add_argument(
        "--picture", default="examples.png", help="where images go (default: %(default)s)"
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from rich.console import Console

    from flax_transformers.cli.config_file import load_config
    from flax_transformers.data.dataset import prepare, training_examples
    from flax_transformers.data.pipeline.loader import TrainStream

    config = load_config(arguments.config, overrides)
    prepared = prepare(config.data, compare="nothing")
    phase = config.phases[0]
    spec = config.objective.window_spec(phase.sequence_length)
    examples = training_examples(prepared, spec)
    stream = TrainStream(
        examples,
        config.objective,
        prepared.vocabulary,
        sequence_length=phase.sequence_length,
        batch_size=arguments.examples,
        seed=(config.seed, 0),
        static_epochs=spec.static_epochs,
    )
    with stream:
        batch = next(stream)
    console = Console(highlight=False, soft_wrap=True)
    if "pixel_values" in batch:
        from flax_transformers.cli.inspect_images import show_images

        show_images(console, batch, prepared.label_names, arguments.picture)
        return 0
    console.print(f"{len(examples):,} windows an epoch; rows of {phase.sequence_length}; {_LEGEND}")
    for i in range(arguments.examples):
        row = {name: values[i] for name, values in batch.items()}
        console.print(f"[bold]example {row.pop('example_id')}[/]")
        for shown in config.objective.show(row):
            tokenizer = (shown.written and prepared.target_tokenizer) or prepared.tokenizer
            if tokenizer is not None:
                console.print(readable(shown, tokenizer, prepared.label_names))
        shapes = ", ".join(
            f"{name} {values.dtype}{list(values.shape)}" for name, values in row.items()
        )
        console.print(Text(f"{shapes}\n", "dim"))
    return 0


def readable(shown: ExampleView, tokenizer: Tokenizer, names: Sequence[str] = ()) -> Text:
    """A sequence's pieces, with what has to be predicted, as rich text on one line.

    ``names`` are those of the classes.
    """
    text = Text()
    text.append(f"{shown.name}: ", "bold")
    nothing = np.full(len(shown.ids), -1)
    labels = nothing if shown.labels is None else shown.labels
    segments = nothing if shown.segments is None else shown.segments
    pieces = tokenizer.pieces(shown.ids)
    predicted = tokenizer.pieces(np.where(labels < 0, shown.ids, labels))
    for place, (piece, label) in enumerate(zip(pieces, predicted, strict=True)):
        if segments[place] >= 0 and (place == 0 or segments[place] != segments[place - 1]):
            text.append(f"«{segments[place]}» ", "bold cyan")
        if labels[place] < 0:
            special = int(shown.ids[place]) in tokenizer.vocabulary.special_ids
            text.append(piece, "dim" if special else "")
        else:
            if labels[place] != shown.ids[place]:
                text.append(piece, "bold red")
                text.append("→")
            text.append(label, "bold green")
        if shown.classes is not None and shown.classes[place] >= 0:
            text.append(f"/{names[shown.classes[place]]}", "bold green")
        text.append(" ")
    if shown.label is not None:
        text.append(names[shown.label], "bold green")
    if shown.note:
        text.append(f"({shown.note})", "italic")
    return text
