"""``flax-transformers inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from flax_transformers.cli.parsing import Config, number, option
from flax_transformers.ranges import integers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from flax_transformers.data.tokenizers.base import Tokenizer
    from flax_transformers.objectives.base import Batch, ExampleView

_LEGEND = (
    "[bold green]green[/] is predicted, [bold red]input[/]→[bold green]label[/] where they differ, "
    "[bold cyan]«n»[/] begins a segment, [bold green]/name[/] is a class; padding is not shown\n"
)
_COLUMNS = 8


@dataclass(frozen=True)
class Inspect:
    """Show prepared training examples as text.

    Any field of the config can be set, as in --objective.mask-fraction 0.3.
    """

    config: Config
    examples: Annotated[int, number("--examples", integers(1, 10_000))] = 3
    """Number of examples."""
    picture: Annotated[str, option("FILE")] = "examples.png"
    """File for the images of image data."""

    def run(self, overrides: Sequence[str]) -> int:
        from rich.console import Console
        from rich.text import Text

        from flax_transformers.cli.config_file import load_config, naming_options
        from flax_transformers.data.dataset import prepare, training_examples
        from flax_transformers.data.pipeline.loader import TrainStream

        config = load_config(self.config, overrides)
        with naming_options(config):
            prepared = prepare(config.data, compare="nothing")
        phase = config.phases[0]
        spec = config.objective.window_spec(phase.sequence_length)
        examples = training_examples(prepared, spec, config.data, config.seed)
        stream = TrainStream(
            examples,
            config.objective,
            prepared.vocabulary,
            sequence_length=phase.sequence_length,
            batch_size=self.examples,
            seed=(config.seed, 0),
            static_epochs=spec.static_epochs,
        )
        with stream:
            batch = next(stream)
        console = Console(highlight=False, soft_wrap=True)
        if "pixel_values" in batch:
            show_images(console, batch, prepared.label_names, self.picture)
            if "input_ids" not in batch:
                return 0
        length = phase.sequence_length
        console.print(f"{len(examples):,} examples an epoch, sequence length {length}; {_LEGEND}")
        for i in range(self.examples):
            row = {name: values[i] for name, values in batch.items()}
            console.print(f"[bold]example {row.pop('example_id')}[/]")
            for shown in config.objective.example_views(row):
                tokenizer = (shown.written and prepared.target_tokenizer) or prepared.tokenizer
                if tokenizer is not None:
                    console.print(rich_line(shown, tokenizer, prepared.label_names))
            shapes = ", ".join(
                f"{name} {values.dtype}{list(values.shape)}" for name, values in row.items()
            )
            console.print(Text(f"{shapes}\n", "dim"))
        return 0


def rich_line(shown: ExampleView, tokenizer: Tokenizer, names: Sequence[str] = ()) -> Text:
    """Tokens and labels of a sequence as rich text on one line, with the ``names`` of classes."""
    import numpy as np
    from rich.text import Text

    text = Text()
    text.append(f"{shown.name}: ", "bold")
    nothing = np.full(len(shown.ids), -1)
    labels = nothing if shown.labels is None else shown.labels
    segments = nothing if shown.segments is None else shown.segments
    pieces = tokenizer.pieces(shown.ids)
    predicted = tokenizer.pieces(np.where(labels < 0, shown.ids, labels))
    for position, (piece, label) in enumerate(zip(pieces, predicted, strict=True)):
        if segments[position] >= 0 and (
            position == 0 or segments[position] != segments[position - 1]
        ):
            text.append(f"«{segments[position]}» ", "bold cyan")
        if labels[position] < 0:
            special = int(shown.ids[position]) in tokenizer.vocabulary.special_ids
            text.append(piece, "dim" if special else "")
        else:
            if labels[position] != shown.ids[position]:
                text.append(piece, "bold red")
                text.append("→")
            text.append(label, "bold green")
        if shown.classes is not None and shown.classes[position] >= 0:
            text.append(f"/{_class_name(shown.classes[position], names)}", "bold green")
        text.append(" ")
    if shown.label is not None:
        text.append(_class_name(shown.label, names), "bold green")
    if shown.note:
        text.append(f"({shown.note})", "italic")
    return text


def _class_name(number: int, names: Sequence[str]) -> str:
    """The number itself where the data name no classes, as for an objective of the user's own."""
    return names[number] if number < len(names) else str(number)


def show_images(console: Console, batch: Batch, label_names: Sequence[str], path: str) -> None:
    """Writes ``pixel_values`` of a batch as one PNG, and prints its path and the labels.

    Each video is a row."""
    import numpy as np
    from etils import epath
    from rich.text import Text

    from flax_transformers.evaluation.pictures import picture_grid, write_png

    pixels = batch["pixel_values"]
    columns = pixels.shape[1] if pixels.ndim == 5 else min(_COLUMNS, len(pixels))
    pictures = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1) / 255.0
    rows = -(-len(pictures) // columns)
    filled = np.ones((rows * columns, *pictures.shape[1:]))
    filled[: len(pictures)] = pictures
    file = epath.Path(path).expanduser()
    write_png(file, picture_grid(filled.reshape(rows, columns, *pictures.shape[1:])))
    # As Text, for names in brackets would be taken for styles.
    console.print(
        Text.assemble(f"{len(pictures)} prepared images, row by row, are in ", (path, "bold"))
    )
    for i, index in enumerate(batch["example_id"]):
        row, column = divmod(i * len(pictures) // len(pixels), columns)
        labels = _labels(batch, i, label_names)
        console.print(Text(f"{row + 1}.{column + 1}  image {index}{labels}"))


def _labels(batch: Batch, i: int, label_names: Sequence[str]) -> str:
    if "label_weights" not in batch:
        return ""
    shares: dict[str, float] = {}
    for label, share in zip(batch["labels"][i], batch["label_weights"][i], strict=True):
        name = _class_name(label, label_names)
        shares[name] = shares.get(name, 0.0) + float(share)
    named = [f"{name} {share:.0%}" for name, share in shares.items() if share > 0]
    return ": " + ", ".join(name.removesuffix(" 100%") for name in named)
