"""The image store: the checked images of a collection, for random access.

A store is a folder. Each split ("train", "validation") has flat little-endian files: ``labels``
(int32), ``items`` (bytes) and ``ends`` (int64, the end of each item). An item is an image file, an
array of pixels, or the place of an image in the source: image files in folders are not copied, and
``digests`` (16 bytes each) detect images that changed. Images with captions have ``captions``, the
lists of each in JSON, and ``caption_ends`` (int64). ``skipped.txt`` names the images that were
left out, with the reason. ``manifest.json`` is written last: a folder without it is not finished.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flax_transformers.data.images.decode import UnreadableImage, decode_image
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.sources import reader
from flax_transformers.data.sources.tfds import PREFIX
from flax_transformers.data.store.files import Content, StoreArray, StoreFiles, StoreReader
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import FileRecord
from flax_transformers.storage.folders import Folder, LocalFolder
from flax_transformers.storage.hub import DATA

FORMAT = 3
MANIFEST = "manifest.json"
SKIPPED = "skipped.txt"
KIND = "image store"
_DIGEST_BYTES = 16
_OPENED = ("labels", "_read")


class ImageSplit:
    """Random access to one split of a store. Picklable: each process opens the files itself.

    ``path``: the source. Opening compares sizes; `verify` reads the files. Raises UserError for
    damaged files, and for a missing source of images that were not copied.
    """

    def __init__(self, directory: str, split: Split, manifest: dict[str, Any], path: str) -> None:
        self.directory, self.split = directory, split
        self._store = StoreReader(LocalFolder(directory), KIND)
        self._arrays: dict[str, StoreArray] = {}
        try:
            self._read_record(manifest["splits"][split], len(manifest["classes"]), path)
            self._store.check_sizes(self._files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._store.damaged(MANIFEST, f"an entry is not valid: {error}") from error

    def _read_record(self, record: dict[str, Any], classes: int, path: str) -> None:
        self.fingerprint: str = record["fingerprint"]
        self._count: int = record["images"]
        self._shape = tuple(record["shape"]) if record["shape"] else None
        self._in_place: bool = record["in_place"]
        self._source = ImageSource(**record["source"])
        if self._in_place and self._count:
            self._source = replace(self._source, path=self._found(path))
        files = {kind: FileRecord(**file) for kind, file in record["files"].items()}
        contents = {
            "items": Content("u1"),
            "labels": Content("<i4", self._count, below=classes),
            "ends": Content("<i8", self._count, last=files["items"].bytes, strictly=True),
            "digests": Content("u1", _DIGEST_BYTES * self._count),
        }
        if "captions" in files:
            last = files["captions"].bytes
            contents["captions"] = Content("u1")
            contents["caption_ends"] = Content("<i8", self._count, last=last, strictly=True)
        self._files: StoreFiles = {
            self._name(kind): (file, contents[kind]) for kind, file in files.items()
        }

    def _found(self, path: str) -> str:
        """The path of the source: ``path``, or where it was when the store was prepared."""
        if path.startswith((PREFIX, DATA)):
            return path
        for place in (path, self._source.path):
            if os.path.exists(os.path.expanduser(place)):
                return place
        raise UserError(
            f"The images of the store in {self.directory} are read from their source, and there is "
            f"nothing at {path}; set data.source.path to their present path."
        )

    def _name(self, kind: str) -> str:
        return f"{self.split}/{kind}"

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [images]."""
        return self._array("labels").read(0, self._count)

    @property
    def has_captions(self) -> bool:
        """Whether images have captions instead of labels."""
        return self._name("captions") in self._files

    def captions(self, index: int) -> list[str]:
        """The captions of image ``index``, at least one."""
        raw = self._entry("captions", "caption_ends", index).tobytes()
        return [str(text) for text in json.loads(raw)]

    @functools.cached_property
    def _read(self) -> Callable[[str], bytes]:
        return reader(self._source)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in _OPENED}
        return kept | {"_arrays": {}}

    def _array(self, kind: str) -> StoreArray:
        if kind not in self._arrays:
            record, content = self._files[self._name(kind)]
            length = record.bytes // np.dtype(content.dtype).itemsize
            self._arrays[kind] = self._store.array(self._name(kind), content.dtype, length)
        return self._arrays[kind]

    def _entry(self, kind: str, ends_kind: str, index: int) -> np.ndarray:
        """The bytes of image ``index`` in a file whose entries end at the ``ends_kind``."""
        ends = self._array(ends_kind)
        return self._array(kind).read(int(ends[index - 1]) if index else 0, int(ends[index]))

    def verify(self) -> None:
        """Reads the files of the split and compares checksums. Raises UserError naming a damaged
        file. Images that were not copied are compared when they are read.
        """
        self._store.check_contents(self._files)

    def pixels(self, index: int, channels: int) -> np.ndarray:
        """uint8 [height, width, channels] of image ``index``.

        Raises UserError if an image was deleted or changed since the store was prepared.
        """
        item = self._entry("items", "ends", index)
        if self._shape is not None:
            pixels = item.reshape(*self._shape, -1)
            return pixels if pixels.shape[2] == channels else np.repeat(pixels, channels, axis=2)
        name = item.tobytes().decode("utf-8", "surrogateescape") if self._in_place else str(index)
        try:
            raw = self._intact(index, self._read(name)) if self._in_place else item.tobytes()
            return decode_image(raw, channels)
        except (UnreadableImage, OSError, RuntimeError, ValueError) as error:
            where = self._source.path if self._in_place else self.directory
            shown = name.encode("utf-8", "replace").decode()
            raise UserError(
                f"Image {shown} of {where} was readable when it was prepared and is no longer "
                f"({error}); restore it and run the same command again."
            ) from error

    def _intact(self, index: int, raw: bytes) -> bytes:
        if self._name("digests") not in self._files:  # of format 2
            return raw
        digests = self._array("digests")
        expected = digests.read(_DIGEST_BYTES * index, _DIGEST_BYTES * (index + 1))
        if image_digest(raw) != expected.tobytes():
            raise UnreadableImage("its content has changed")
        return raw


def caption_bytes(captions: Sequence[str]) -> bytes:
    """Captions as a store has them."""
    return json.dumps(list(captions), ensure_ascii=False).encode("utf-8", "replace")


def image_digest(raw: bytes) -> bytes:
    """A hash of an image file or array."""
    return hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).digest()


def source_json(source: ImageSource) -> dict[str, str]:
    """The fields that a store depends on, with an absolute path."""
    fields = {name: value for name, value in vars(source).items() if name != "label_names"}
    if not source.path.startswith((PREFIX, DATA)):
        fields["path"] = os.path.abspath(os.path.expanduser(source.path))
    return fields


def read_image_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a finished store. Raises UserError if it is damaged or of another format."""
    converters = {2: functools.partial(_from_format_2, folder)}
    return StoreReader(folder, KIND).manifest(MANIFEST, FORMAT, converters)


def _from_format_2(folder: Folder, manifest: dict[str, Any]) -> dict[str, Any]:
    """Format 2 had checksums of the files, but no sizes and no ``digests`` of images."""
    for split, record in manifest["splits"].items():
        items = os.path.join(folder.path, split, "items")
        sizes = {
            "items": os.path.getsize(items) if os.path.isfile(items) else 0,
            "labels": 4 * record["images"],
            "ends": 8 * record["images"],
        }
        record["files"] = {
            kind: {"bytes": sizes[kind], "sha256": sha256}
            for kind, sha256 in record["files"].items()
        }
    return manifest
