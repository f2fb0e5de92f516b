"""Opens image sources: folders, MNIST's files, parquet files, and data prepared by TFDS.

A source is read once, in order, when it is prepared; see `store` for what is kept.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flax_transformers.data.images.captions import open_captioned, read_place
from flax_transformers.data.images.files import ENDINGS, FolderImages, IdxImages, idx_files
from flax_transformers.data.images.kinds import (
    SPLIT_NAMES,
    Images,
    ImageSource,
    folders_by_name,
    split_of_path,
)
from flax_transformers.data.images.tables import ParquetImages, RecordImages
from flax_transformers.data.sources.files import reading_source
from flax_transformers.data.sources.row_files import reading_parquet
from flax_transformers.data.sources.tfds import PREFIX, tfds_builder
from flax_transformers.errors import UserError
from flax_transformers.storage.hub import find_data

HELD_OUT = ("validation", "test")
"""Names of splits for evaluation; the first that exists is used."""


@functools.lru_cache(maxsize=8)
def open_images(source: ImageSource) -> Images:
    """Opens one split. Raises UserError if it does not exist or is not supported."""
    if source.path.startswith(PREFIX):
        if source.caption_field:
            raise UserError(
                f"Captions are not read from {source.path}, as TFDS has it; give a folder, or "
                "files of the kinds jsonl, parquet or tar."
            )
        return RecordImages(source)
    path = find_data(source.path)
    root = Path(os.path.expanduser(path))
    if "://" in path:
        raise UserError(
            f"Images are read from local files or TFDS, not from {source.path}; copy them first."
        )
    with reading_source(root):
        return _opened(source, root)


def _opened(source: ImageSource, root: Path) -> Images:
    if not root.exists():
        raise UserError(f"There is no file or folder {source.path}; check the path.")
    parquet = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if root.is_dir() and parquet and _is_beside_images(source, root, parquet[0]):
        parquet = []
    if source.caption_field and not (parquet and parquet[0].suffix == ".parquet"):
        return open_captioned(source, root)
    if root.is_dir() and idx_files(root):
        return IdxImages(source, root)
    if parquet:
        return ParquetImages(source, root, parquet)
    return FolderImages(source, root)


def _is_beside_images(source: ImageSource, root: Path, path: Path) -> bool:
    """Whether a parquet file describes images in other files of a folder, as img2dataset writes
    it."""
    from pyarrow import parquet

    with reading_parquet(path):
        if source.image_field in parquet.read_schema(path).names:
            return False
    endings = (*ENDINGS, ".tar") if source.caption_field else ENDINGS
    return any(file.suffix.lower() in endings for file in root.rglob("*"))


def reader(source: ImageSource) -> Callable[[str], bytes]:
    """A function from the place of an image to its bytes, for images that are not copied.

    It raises OSError, RuntimeError or ValueError for a missing image.
    """
    if source.path.startswith(PREFIX):
        return RecordImages(source).bytes_at
    root = Path(os.path.expanduser(find_data(source.path)))
    return partial(read_place, root.parent if root.is_file() else root)


def own_held_out(source: ImageSource) -> str | None:
    """The name of the source's split for evaluation, if it has one."""
    if source.path.startswith(PREFIX):
        names: Sequence[str] = list(tfds_builder(source.path).info.splits)
    else:
        root = Path(os.path.expanduser(find_data(source.path)))
        kinds = ("parquet", "tar", "jsonl") if source.caption_field else ("parquet",)
        with reading_source(root):
            if not root.is_dir():
                return None
            files = [path for kind in kinds for path in root.rglob(f"*.{kind}")]
            found = folders_by_name(root)
        names = [
            *(name for path in files if (name := split_of_path(root, path))),
            *(split for split in SPLIT_NAMES if any(n in SPLIT_NAMES[split] for n in found)),
            *idx_files(root),
        ]
    return next((name for name in HELD_OUT if name in names and name != source.split), None)
