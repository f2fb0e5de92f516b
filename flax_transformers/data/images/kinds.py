"""Interfaces of image sources: settings, images, and names of splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from flax_transformers import ranges
from flax_transformers.data.sources.documents import listed
from flax_transformers.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "t10k"),
}


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, described by plain values.

    ``path``: a folder with a subfolder of image files for each class, also below ``train``, ``val``
    ...; or with MNIST's files (``train-images-idx3-ubyte.gz`` ...); or with parquet files
    (``train-00000-of-00001.parquet`` ..., or in folders ``train`` ...); one parquet file;
    "tfds:NAME[/CONFIG][:VERSION]" or "tfds:/folder/of/a/prepared/builder". A folder of image files
    without subfolders is one class.
    ``split``: "train", "validation" or "test", or a split of TFDS ("train[:10%]"). Of a source
    without splits, "train" is all of it.
    ``image_field`` and ``label_field``: names of parquet columns and TFDS features.
    ``label_names``: names of the classes in the order of their numbers; default: those of the
    source.
    ``caption_field``: for images with captions instead of labels, see ``captions``.
    """

    path: str
    split: str = "train"
    image_field: str = "image"
    label_field: str = "label"
    label_names: tuple[str, ...] = ()
    caption_field: str = ""

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.source")


class FoundImage(NamedTuple):
    """An image file or array, its label or captions, and its ``place`` in the source."""

    place: str
    raw: bytes
    label: int
    captions: tuple[str, ...] = ()


class Images(Protocol):
    """One opened split of a source."""

    classes: tuple[str, ...]
    shape: tuple[int, ...] | None
    """Shape [height, width] of arrays of pixels; None for encoded images."""
    in_place: bool
    """Whether training reads the images from the source with `reader`; else they are copied."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[FoundImage]:
        """Images [start, stop) in order; empty bytes for an image that cannot be read."""
        ...

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files of the images, in order."""
        ...


def names_of_split(split: str) -> tuple[str, ...]:
    """What the folder of a split may be called, in `folders_by_name`."""
    return split, split.lower(), *SPLIT_NAMES.get(split.lower(), ())


def split_of_file(name: str) -> str | None:
    """The split at the beginning of a file name, as in train-00000-of-00001.parquet."""
    first = re.split(r"[-_.]", name)[0].lower()
    return next((split for split, names in SPLIT_NAMES.items() if first in names), None)


def split_of_path(root: Path, path: Path, other: str = "") -> str | None:
    """The split that a folder between ``root`` and a file is named by, or else its name; ``other``
    is a further split."""
    known = {other: (other,)} | SPLIT_NAMES
    for folder in reversed(path.relative_to(root).parts[:-1]):
        for split, names in known.items():
            if folder in names or folder.lower() in names:
                return split
    return split_of_file(path.name)


def folders_by_name(root: Path) -> dict[str, Path]:
    """The subfolders by name: Training/ and Testing/ by training and testing.

    One of another case alone, such as Test/ without Train/, may be a class, and keeps its name.
    """
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
    split_of = {name: split for split, names in SPLIT_NAMES.items() for name in names}
    splits = {split_of[name.lower()] for name in folders if name.lower() in split_of}
    if "train" not in splits or len(splits) == 1:
        return folders
    return {
        name.lower() if name.lower() in split_of else name: path for name, path in folders.items()
    }


def files_of_split(source: ImageSource, root: Path, files: Sequence[Path], kind: str) -> list[Path]:
    """The files in ``root`` of the source's split. Raises UserError, naming the ``kind``, if there
    are none."""
    if source.split == "train" and [path.name for path in files] == [Path(source.path).name]:
        return list(files)  # the source is one file, whatever its name
    named = [(split_of_path(root, path, source.split), path) for path in files]
    if any(split for split, _ in named) or source.split != "train":
        files = [path for split, path in named if split == source.split]
    if not files:
        splits = {split for split, _ in named if split}
        raise UserError(
            f"{source.path} has no {kind} files of the split {source.split!r}, only of "
            f"{listed(splits)}; check data.source."
        )
    return list(files)
