"""What an image source is: its settings, the images that it holds, and the names of its splits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from flax_transformers import ranges

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "t10k"),
}


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, described by plain values.

    ``path``: a folder with a subfolder of image files for each class, perhaps below ``train``,
    ``val`` ...; or with MNIST's files (``train-images-idx3-ubyte.gz`` ...); or with parquet files
    (``train-00000-of-00001.parquet`` ...); one parquet file; "tfds:NAME[/CONFIG][:VERSION]" or
    "tfds:/folder/of/a/prepared/builder". A folder of image files alone is one class.
    ``split``: "train", "validation" or "test", and what TFDS understands ("train[:10%]"). Where a
    source is not divided, "train" is all of it.
    ``image_field`` and ``label_field``: names of parquet columns and TFDS features.
    ``label_names``: what to call the classes, in the order of their numbers; by default what the
    source calls them.
    """

    path: str
    split: str = "train"
    image_field: str = "image"
    label_field: str = "label"
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.source")


class Found(NamedTuple):
    """An image as its source has it. ``place`` says where that is."""

    place: str
    raw: bytes
    label: int


class Images(Protocol):
    """One split of a source, opened."""

    classes: tuple[str, ...]
    shape: tuple[int, ...] | None
    """Of arrays of pixels [height, width]; None where images are files that have to be decoded."""
    in_place: bool
    """Whether training reads the images where they lie, with `reader`; else they are copied."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Found]:
        """Images ``start`` to ``stop`` in order; empty bytes for one that cannot be read."""
        ...

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that hold the images, in order."""
        ...


def split_of_file(name: str) -> str | None:
    """The split that a file's name begins with, as in train-00000-of-00001.parquet."""
    first = re.split(r"[-_.]", name)[0]
    return next((split for split, names in SPLIT_NAMES.items() if first in names), None)
