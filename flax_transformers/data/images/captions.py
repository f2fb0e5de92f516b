"""Images with captions: in folders, lines of JSON, parquet files and tar files of WebDataset.

``ImageSource.caption_field`` says where captions are. They are a text, a list of texts, or a record
of texts (by language), all of which are captions of the image.

* A folder of image files: with "txt", the lines of a file beside each image that has its name and
  the ending .txt; with any other name, that field of such a .json file.
* WebDataset: tar files, not compressed, whose members of one key belong together. Captions are as
  in folders.
* Lines of JSON: a .jsonl file, or a folder with some. ``image_field`` is the path of the image file
  relative to the folder, and ``caption_field`` the field of the captions.
* Parquet files: columns of encoded images and captions; see ``tables``. Without the column
  ``image_field``, they are not read beside images in other files: img2dataset writes such ones.

The files of a split are named by it, as ``train-0001.tar``, or are in a folder of its name.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_transformers.data.images import kinds
from flax_transformers.data.images.files import ENDINGS, image_files
from flax_transformers.data.sources.files import reading_source
from flax_transformers.errors import UserError

CAPTIONED: tuple[str, ...] = ("image",)
"""The one class of images with captions."""
LINES = "txt"


def captions_in(value: Any) -> tuple[str, ...]:
    """The captions in a text, a list or a record; none in anything else."""
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return tuple(caption for part in parts for caption in captions_in(part))


def open_captioned(source: kinds.ImageSource, root: Path) -> kinds.Images:
    """The images of folders, lines of JSON or tar files. Raises UserError for others."""
    if root.is_dir():
        names = kinds.names_of_split(source.split)
        folders = kinds.folders_by_name(root)
        inner = next((folders[name] for name in names if name in folders), root)
        lines, tars = (sorted(inner.rglob(f"*.{kind}")) for kind in ("jsonl", "tar"))
    else:
        inner = root
        lines, tars = ([root] if root.suffix == f".{kind}" else [] for kind in ("jsonl", "tar"))
    top = root if root.is_dir() else root.parent
    if tars:
        tars = tars if inner != root else kinds.files_of_split(source, root, tars, "tar")
        return TarImages(source, top, tars)
    if lines:
        lines = lines if inner != root else kinds.files_of_split(source, root, lines, "jsonl")
        return LineImages(source, top, lines)
    if not root.is_dir():
        raise UserError(
            f"{root} is of no kind that images with captions are read from; give a folder, or a "
            "file that ends in .jsonl, .parquet or .tar"
        )
    if inner == root and source.split != "train":
        raise UserError(
            f"The folder {source.path} has no subfolder for the split {source.split!r}; check "
            "data.source."
        )
    return BesideImages(source, top, inner)


def read_place(root: Path, place: str) -> bytes:
    """The image file at a place in ``root``: a path, or "path.tar:offset:size"."""
    name, _, span = place.partition(".tar:")
    if not span:
        return (root / place).read_bytes()
    offset, size = map(int, span.split(":"))
    return _span(root / f"{name}.tar", offset, size)


def _span(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _parsed(source: kinds.ImageSource, raw: bytes) -> tuple[str, ...]:
    """The captions in a .txt file, or in a field of a .json file; none if it is damaged."""
    try:
        if source.caption_field == LINES:
            return captions_in(raw.decode("utf-8-sig").replace("\r", "\n").split("\n"))
        found = json.loads(raw)
    except ValueError:
        return ()
    return captions_in(found.get(source.caption_field)) if isinstance(found, dict) else ()


def _ending(source: kinds.ImageSource) -> str:
    return ".txt" if source.caption_field == LINES else ".json"


class BesideImages:
    """Image files in a folder, with files of captions beside them."""

    classes = CAPTIONED
    shape: tuple[int, ...] | None = None
    in_place = True

    def __init__(self, source: kinds.ImageSource, top: Path, folder: Path) -> None:
        self._source, self._top = source, top
        # Of a folder that is not divided, subfolders of splits are for evaluation.
        splits = [name for names in kinds.SPLIT_NAMES.values() for name in names]
        self._files = list(image_files(folder, splits if folder == top else ()))
        if not any(path.with_suffix(_ending(source)).is_file() for path in self._files):
            raise UserError(
                f"The folder {folder} has no image file with a {_ending(source)} file beside it; "
                "check data.source.path and caption_field."
            )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int) -> Iterator[kinds.FoundImage]:
        for path in self._files[start:stop]:
            try:
                raw, beside = path.read_bytes(), path.with_suffix(_ending(self._source))
                text = beside.read_bytes() if beside.is_file() else b""
            except OSError:
                raw, text = b"", b""
            place = path.relative_to(self._top).as_posix()
            yield kinds.FoundImage(place, raw, 0, _parsed(self._source, text) if text else ())

    def files(self) -> list[tuple[str, Path]]:
        beside = [path.with_suffix(_ending(self._source)) for path in self._files]
        both = [*self._files, *(path for path in beside if path.is_file())]
        return [(path.relative_to(self._top).as_posix(), path) for path in both]


class LineImages:
    """Rows of .jsonl files that name image files."""

    classes = CAPTIONED
    shape: tuple[int, ...] | None = None
    in_place = True

    def __init__(self, source: kinds.ImageSource, top: Path, files: list[Path]) -> None:
        self._source, self._top, self._files = source, top, files
        self._rows: list[tuple[str, tuple[str, ...]]] = []
        for file in files:
            with reading_source(file), file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self._rows.append(self._row(file, number, line))

    def _row(self, file: Path, number: int, line: bytes) -> tuple[str, tuple[str, ...]]:
        """The path of the image relative to the source, and its captions."""
        try:
            row = json.loads(line)
            name, captions = row[self._source.image_field], row[self._source.caption_field]
            place = (file.parent / name).relative_to(self._top).as_posix()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"Line {number} of {file} is no record with an image file in its field "
                f"{self._source.image_field!r} and captions in {self._source.caption_field!r} "
                f"({error}); fix it, or set data.source.image_field and caption_field."
            ) from error
        return place, captions_in(captions)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[kinds.FoundImage]:
        for place, captions in self._rows[start:stop]:
            try:
                raw = (self._top / place).read_bytes()
            except (OSError, ValueError):  # a name with NUL or a lone surrogate
                raw = b""
            yield kinds.FoundImage(place, raw, 0, captions)

    def files(self) -> list[tuple[str, Path]]:
        places = dict.fromkeys(place for place, _ in self._rows)
        images = [(place, self._top / place) for place in places]
        named = [(file.relative_to(self._top).as_posix(), file) for file in self._files]
        return [*named, *((place, path) for place, path in images if path.is_file())]


class TarImages:
    """Tar files in WebDataset's layout: members whose names are equal up to the first dot."""

    classes = CAPTIONED
    shape: tuple[int, ...] | None = None
    in_place = True

    def __init__(self, source: kinds.ImageSource, top: Path, files: list[Path]) -> None:
        self._source, self._top, self._files = source, top, files
        self._pairs = [pair for file in files for pair in self._pairs_of(file)]

    def _pairs_of(self, file: Path) -> Iterator[tuple[Path, tuple[int, int], tuple[int, int]]]:
        """File, and offset and size of an image and of its captions (size 0: none)."""
        images: dict[str, tuple[int, int]] = {}
        texts: dict[str, tuple[int, int]] = {}
        try:
            with reading_source(file), tarfile.open(file, "r:") as members:
                for member in members:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    span = (member.offset_data, member.size)
                    if member.isfile() and f".{kind.lower()}" in ENDINGS:
                        images.setdefault(f"{folder}/{stem}", span)
                    elif member.isfile() and f".{kind.lower()}" == _ending(self._source):
                        texts[f"{folder}/{stem}"] = span
        except tarfile.TarError as error:
            raise UserError(
                f"{file} is damaged, or compressed ({error}); copy it again, or decompress it, as "
                "images are read from it at random."
            ) from error
        for key, span in images.items():
            yield file, span, texts.get(key, (0, 0))

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, start: int, stop: int) -> Iterator[kinds.FoundImage]:
        for file, (offset, size), text in self._pairs[start:stop]:
            place = f"{file.relative_to(self._top).as_posix()}:{offset}:{size}"
            try:
                raw, caption = _span(file, offset, size), _span(file, *text)
            except OSError:
                raw, caption = b"", b""
            yield kinds.FoundImage(place, raw, 0, _parsed(self._source, caption) if caption else ())

    def files(self) -> list[tuple[str, Path]]:
        return [(file.relative_to(self._top).as_posix(), file) for file in self._files]
