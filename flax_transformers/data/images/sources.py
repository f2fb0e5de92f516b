"""Where images come from: folders, MNIST's files, parquet files, and what TFDS has prepared.

A source is read once, in order, when it is prepared. What it says of an image is its bytes, its
label, and where it lies; `image_store` keeps of these what random access needs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from flax_transformers.data.images.files import FolderImages, IdxImages, idx_files
from flax_transformers.data.images.kinds import SPLIT_NAMES, Images, ImageSource, split_of_file
from flax_transformers.data.images.tables import ParquetImages, RecordImages
from flax_transformers.data.sources.tfds import PREFIX, tfds_builder
from flax_transformers.errors import UserError

HELD_OUT = ("validation", "test")
"""Names of splits that are for evaluation, the first that is there before the others."""


@functools.lru_cache(maxsize=8)
def open_images(source: ImageSource) -> Images:
    """Opens one split. Raises UserError for what is not there or not understood."""
    if source.path.startswith(PREFIX):
        return RecordImages(source)
    root = Path(os.path.expanduser(source.path))
    if "://" in source.path:
        raise UserError(
            f"Images are read from local files or TFDS, not from {source.path}; copy them first."
        )
    if not root.exists():
        raise UserError(f"There is no file or folder {source.path}; check data.source.path.")
    parquet = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if root.is_dir() and idx_files(root):
        return IdxImages(source, root)
    if parquet:
        return ParquetImages(source, parquet)
    return FolderImages(source, root)


def reader(source: ImageSource) -> Callable[[str], bytes]:
    """What gives the bytes at a place of images that are read where they lie.

    It raises OSError, RuntimeError or ValueError for what is gone.
    """
    if source.path.startswith(PREFIX):
        return RecordImages(source).bytes_at
    root = Path(os.path.expanduser(source.path))
    return lambda place: (root / place).read_bytes()


def own_held_out(source: ImageSource) -> str | None:
    """The name of the split that the source itself keeps for evaluation, if it has one."""
    if source.path.startswith(PREFIX):
        names: Sequence[str] = list(tfds_builder(source.path).info.splits)
    else:
        root = Path(os.path.expanduser(source.path))
        if not root.is_dir():
            return None
        files = [path.name for path in root.rglob("*.parquet")]
        found = [path.name for path in root.iterdir() if path.is_dir()]
        names = [
            *(name for name in map(split_of_file, files) if name),
            *(split for split in SPLIT_NAMES if any(n in SPLIT_NAMES[split] for n in found)),
            *idx_files(root),
        ]
    return next((name for name in HELD_OUT if name in names and name != source.split), None)
