"""Image files in folders, and MNIST's two files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from flax_transformers.data.images.kinds import (
    SPLIT_NAMES,
    FoundImage,
    ImageSource,
    folders_by_name,
    names_of_split,
)
from flax_transformers.data.sources.documents import listed
from flax_transformers.data.sources.files import open_decompressed, reading_source
from flax_transformers.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_IDX = re.compile(
    r"(?:.*-)?(train|test|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz|\.bz2|\.xz|\.zst)?"
)


class FolderImages:
    """A folder with a subfolder of image files for each class."""

    shape: tuple[int, ...] | None = None
    in_place = True

    def __init__(self, source: ImageSource, root: Path) -> None:
        splits = split_folders(source, root)
        train = next((splits[name] for name in SPLIT_NAMES["train"] if name in splits), root)
        self._top, self.root = root, train
        if source.split != "train":
            names = names_of_split(source.split)
            found = next((splits[name] for name in names if name in splits), None)
            if found is None:
                parts = sorted(path.name for path in root.iterdir() if path.is_dir())
                raise UserError(
                    f"The folder {source.path} has no subfolder for the split {source.split!r}, it "
                    f"has {listed(parts)}; check data.source."
                )
            self.root = found
        self._others = splits.keys() if train == root else ()  # no classes of it
        self.classes = _class_folders(train, self._others) or (train.name,)
        self._files = list(self._listed(source))
        if not self._files:
            raise UserError(
                f"The folder {self.root} has neither image files ({', '.join(ENDINGS)}) nor "
                "parquet files nor those of MNIST; check data.source.path."
            )

    def _listed(self, source: ImageSource) -> Iterator[tuple[str, int]]:
        others = self._others if self.root == self._top else ()
        here = _class_folders(self.root, others)
        unknown = sorted(set(here) - set(self.classes))
        if unknown:
            raise UserError(
                f"The folder {self.root} has a class {unknown[0]!r} that the training images do "
                "not have; the subfolders of all splits must have the same names."
            )
        if not here:
            if len(self.classes) > 1:
                raise UserError(
                    f"The folder {self.root} has no subfolder for each class, as the training "
                    "images have; sort its images into such subfolders."
                )
            yield from ((self._name(file), 0) for file in image_files(self.root, others))
        for label, name in enumerate(self.classes):
            if name in here:
                yield from ((self._name(file), label) for file in image_files(self.root / name))

    def _name(self, file: Path) -> str:
        return file.relative_to(self._top).as_posix()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int) -> Iterator[FoundImage]:
        for name, label in self._files[start:stop]:
            try:
                raw = (self._top / name).read_bytes()
            except OSError:
                raw = b""
            yield FoundImage(name, raw, label)

    def files(self) -> list[tuple[str, Path]]:
        return [(name, self._top / name) for name, _ in self._files]


def split_folders(source: ImageSource, root: Path) -> dict[str, Path]:
    """The subfolders named by splits, by name.

    Raises UserError if they may be classes: if they are not the training and another split, have no
    classes of their own, and are beside folders of other names with images.
    """
    known = {source.split, *(name for names in SPLIT_NAMES.values() for name in names)}
    named = {name: path for name, path in folders_by_name(root).items() if name in known}
    train = [path for name, path in named.items() if name in SPLIT_NAMES["train"]]
    if train and (len(named) > len(train) or any(map(_class_folders, train))):
        return named
    beside = _class_folders(root, named) if named else ()
    for name in sorted(set(_class_folders(root)) & named.keys()) if beside else ():
        if not _class_folders(named[name]):
            raise UserError(
                f"The folder {root} has images in {name}/ and in {beside[0]}/, so that {name} may "
                f"be a split or a class; if it is a class, move all classes into a folder train/, "
                f"and if it is a split, move {beside[0]}/ elsewhere."
            )
    return named


def _class_folders(folder: Path, others: Collection[str] = ()) -> tuple[str, ...]:
    """Subfolders with image files, but for ``others``, in the order of the class numbers."""
    return tuple(
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in others and not path.name.startswith(".")
        if path.is_dir() and any(map(_is_image, path.rglob("*")))
    )


def image_files(folder: Path, others: Collection[str] = ()) -> Iterator[Path]:
    """All image files below a folder, but for those in its subfolders ``others``, sorted."""
    for path in sorted(folder.rglob("*")):
        if _is_image(path) and not (others and path.relative_to(folder).parts[0] in others):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()


class IdxImages:
    """MNIST's format: all images in one array, all labels in another."""

    in_place = False

    def __init__(self, source: ImageSource, root: Path) -> None:
        files = idx_files(root)
        if source.split not in files:
            raise UserError(
                f"The folder {source.path} has no split {source.split!r}, it has "
                f"{listed(files)}; check data.source."
            )
        missing = {"images", "labels"} - files[source.split].keys()
        if missing:
            raise UserError(
                f"The folder {source.path} has no {missing.pop()} for the split {source.split!r}; "
                "both files must be there."
            )
        self._files = files[source.split]
        self._images = read_idx(self._files["images"], dimensions=3)
        self._labels = read_idx(self._files["labels"], dimensions=1)
        if len(self._images) != len(self._labels):
            raise UserError(
                f"{self._files['images']} holds {len(self._images)} images and "
                f"{self._files['labels']} {len(self._labels)} labels; copy both files again."
            )
        self.shape: tuple[int, ...] | None = self._images.shape[1:]
        self.classes = tuple(map(str, range(int(self._labels.max(initial=0)) + 1)))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> Iterator[FoundImage]:
        for number in range(start, min(stop, len(self))):
            raw, label = self._images[number].tobytes(), int(self._labels[number])
            yield FoundImage(f"image {number}", raw, label)

    def files(self) -> list[tuple[str, Path]]:
        return [(kind, path) for kind, path in sorted(self._files.items())]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes in MNIST's format. Raises UserError if it is damaged."""
    with reading_source(path), open_decompressed(path) as file:
        content = file.read()
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    size = int(np.prod(shape, dtype=object)) if len(shape) == dimensions else -1
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) - header != size:
        raise UserError(
            f"{path} is not a complete idx file of bytes in {dimensions} dimension(s); copy it "
            "again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def idx_files(root: Path) -> dict[str, dict[str, Path]]:
    """Files of images and labels by split."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(root.iterdir()):
        match = _IDX.fullmatch(path.name)
        if match:
            split = "train" if match[1] == "train" else "test"
            found.setdefault(split, {})[match[2]] = path
    return found
