"""Show prepared images: a picture of them all, and their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath
from rich.console import Console

from flax_transformers.evaluation.pictures import picture_grid, write_png
from flax_transformers.objectives.base import Batch

COLUMNS = 8


def show_images(console: Console, batch: Batch, label_names: Sequence[str], path: str) -> None:
    """Writes ``pixel_values`` of a batch as one PNG, and prints where it is and what is on it."""
    pictures = batch["pixel_values"].transpose(0, 2, 3, 1) / 255.0
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    filled = np.ones((rows * columns, *pictures.shape[1:]))
    filled[: len(pictures)] = pictures
    write_png(epath.Path(path), picture_grid(filled.reshape(rows, columns, *pictures.shape[1:])))
    console.print(f"{len(pictures)} prepared images, row by row, are in [bold]{path}[/]")
    for i, number in enumerate(batch["example_id"]):
        console.print(
            f"{i // columns + 1}.{i % columns + 1}  image {number}{_labels(batch, i, label_names)}"
        )


def _labels(batch: Batch, i: int, label_names: Sequence[str]) -> str:
    if "label_weights" not in batch:
        return ""
    shares: dict[str, float] = {}
    for label, share in zip(batch["labels"][i], batch["label_weights"][i], strict=True):
        name = label_names[label]
        shares[name] = shares.get(name, 0.0) + float(share)
    named = [f"{name} {share:.0%}" for name, share in shares.items() if share > 0]
    return ": " + ", ".join(name.removesuffix(" 100%") for name in named)
