"""The image store: every image checked once, and what finding it at random needs.

A store is a folder. Each split ("train", "validation") has three flat little-endian files:
``labels`` (int32), ``items`` (bytes) and ``ends`` (int64, where each item ends). An item is the
image file itself, its pixels where the source has arrays of these, or the place where the source
has it: large collections are read where they lie. ``skipped.txt`` names what was left out and why.
``manifest.json`` is written last: a folder without it is no store yet.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_transformers.data.folders import LocalFolder
from flax_transformers.data.image_decode import UnreadableImage, decode_image
from flax_transformers.data.image_kinds import ImageSource
from flax_transformers.data.image_sources import reader
from flax_transformers.data.store import Split
from flax_transformers.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
SKIPPED = "skipped.txt"
FILES = ("items", "labels", "ends")


class ImageSplit:
    """One split of a store, at random. Picklable: each process opens the files for itself."""

    def __init__(self, directory: str, split: Split, record: dict[str, Any]) -> None:
        self.directory, self.split = directory, split
        self.fingerprint: str = record["fingerprint"]
        self._count: int = record["images"]
        self._shape = tuple(record["shape"]) if record["shape"] else None
        self._source = ImageSource(**record["source"]) if record["in_place"] else None
        self._digests: dict[str, str] = record["files"]

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [images]."""
        return self._array("labels", "<i4")

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return self._array("ends", "<i8")

    @functools.cached_property
    def _items(self) -> np.ndarray:
        return self._array("items", "u1")

    @functools.cached_property
    def _read(self) -> Callable[[str], bytes]:
        assert self._source is not None
        return reader(self._source)

    def __getstate__(self) -> dict[str, Any]:
        opened = ("labels", "_ends", "_items", "_read")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def _array(self, kind: str, dtype: str) -> np.ndarray:
        try:
            return LocalFolder(self.directory).array(f"{self.split}/{kind}", dtype)
        except OSError as error:
            raise UserError(
                f"The image store in {self.directory} cannot be read ({error}); delete it and "
                "prepare it again."
            ) from error

    def verify(self) -> None:
        """Reads the files of the split and compares digests. Raises UserError naming a damaged one.

        Images that are read where they lie are not in them.
        """
        for kind in FILES:
            if hashlib.sha256(self._array(kind, "u1").data).hexdigest() != self._digests[kind]:
                raise UserError(
                    f"The file {self.split}/{kind} of the image store in {self.directory} does not "
                    "match its recorded sha256; delete the store and prepare it again."
                )

    def pixels(self, index: int, channels: int) -> np.ndarray:
        """uint8 [height, width, channels] of image ``index``.

        Raises UserError where an image that was there when the store was made is gone or changed:
        training stops, and goes on from its last checkpoint once it is back.
        """
        start = int(self._ends[index - 1]) if index else 0
        item = self._items[start : int(self._ends[index])]
        if self._shape is not None:
            pixels = item.reshape(*self._shape, -1)
            return pixels if pixels.shape[2] == channels else np.repeat(pixels, channels, axis=2)
        place = item.tobytes()
        try:
            raw = place if self._source is None else self._read(place.decode())
            return decode_image(raw, channels)
        except (UnreadableImage, OSError, RuntimeError, ValueError) as error:
            where = self.directory if self._source is None else self._source.path
            name = index if self._source is None else place.decode(errors="replace")
            raise UserError(
                f"Image {name} of {where} was readable when it was prepared and is no longer "
                f"({error}); bring it back and run the same command again."
            ) from error


def source_json(source: ImageSource) -> dict[str, str]:
    """The fields that a store depends on; a path is absolute, as a run may start elsewhere."""
    fields = {name: value for name, value in vars(source).items() if name != "label_names"}
    if not source.path.startswith("tfds:"):
        fields["path"] = os.path.abspath(os.path.expanduser(source.path))
    return fields


def read_manifest(folder: LocalFolder) -> dict[str, Any]:
    """The manifest of a finished store. Raises UserError for one that is damaged or too new."""
    try:
        manifest: dict[str, Any] = json.loads(folder.read(MANIFEST))
        format = manifest["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{folder.path}/{MANIFEST} is no image store's ({error}); delete that folder and "
            "prepare it again, or choose another store."
        ) from error
    if format != FORMAT or "classes" not in manifest:
        raise UserError(
            f"{folder.path} is no image store of this version; choose another store, or delete it "
            "and prepare it again."
        )
    return manifest
