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
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from flax_transformers.data.folders import LocalFolder, writing
from flax_transformers.data.image_decode import UnreadableImage, decode_image, pillow
from flax_transformers.data.image_kinds import ImageSource
from flax_transformers.data.image_sources import open_images, reader
from flax_transformers.data.prepare import cores
from flax_transformers.data.processes import end_with_parent
from flax_transformers.data.store import SPLITS, Split, to_json
from flax_transformers.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.txt"
_CHUNK = 512  # images that a process checks at a time
_FEW = 8192  # images that are not worth starting processes for


class ImageSplit:
    """One split of a store, at random. Picklable: each process opens the files for itself."""

    def __init__(self, directory: str, split: Split, record: dict[str, Any]) -> None:
        self.directory, self.split = directory, split
        self.fingerprint: str = record["fingerprint"]
        self._count: int = record["images"]
        self._shape = tuple(record["shape"]) if record["shape"] else None
        self._source = ImageSource(**record["source"]) if record["in_place"] else None

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


class _Checked(NamedTuple):
    """An image, or why it is left out. ``item`` is what the store holds of it."""

    place: str
    item: bytes
    label: int
    digest: bytes
    problem: str | None


def check_images(source: ImageSource, start: int, stop: int) -> list[_Checked]:
    """Reads and decodes images ``start`` to ``stop`` of a source."""
    images = open_images(source)
    checked = []
    for place, raw, label in images.read(start, stop):
        problem = None
        if not 0 <= label < len(images.classes):
            problem = "has no label"
        elif images.shape is None:
            try:
                decode_image(raw, channels=3)
            except UnreadableImage as error:
                problem = str(error)
        item = place.encode("utf-8", "surrogateescape") if images.in_place else raw
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        checked.append(_Checked(place, b"" if problem else item, label, digest, problem))
    return checked


def write_store(
    folder: LocalFolder,
    source: ImageSource,
    validation: ImageSource | None,
    fraction: float,
    processes: int | None,
    origin: dict[str, Any],
) -> None:
    """Checks all images and writes the store.

    ``validation`` is a source of its own for evaluation; without it, ``fraction`` of the images
    are held out by a hash of their bytes, so that equal ones stay on one side. The store does not
    depend on the number of ``processes``. Raises UserError where a split stays empty.
    """
    classes = open_images(source).classes
    with writing(folder.path):
        writers = {split: _SplitWriter(folder, split) for split in SPLITS}
    try:
        skipped = _sort(writers, _checked(source, processes), fraction if not validation else 0.0)
        if validation is not None:
            _check_classes(source, validation)
            skipped += _sort(writers, _checked(validation, processes), 1.0)
        counts = {split: len(writer.labels) for split, writer in writers.items()}
        _check_counts(source, counts, len(skipped), held_out=validation is not None or fraction > 0)
        origins = {"train": source, "validation": validation or source}
        splits = {split: writers[split].finish(origins[split]) for split in SPLITS}
    finally:
        for writer in writers.values():
            writer.close()
    manifest = {
        "format": FORMAT,
        "origin": origin,
        "classes": list(classes),
        "skipped": len(skipped),
        "splits": splits,
    }
    folder.write(SKIPPED, "".join(f"{line}\n" for line in skipped).encode("utf-8", "replace"))
    folder.write(MANIFEST, to_json(manifest))
    print(
        f"Prepared {counts['train']:,} training and {counts['validation']:,} held-out images of "
        f"{len(classes)} classes in {folder.path} (left out: {len(skipped):,}"
        f"{'; see ' + SKIPPED + ' there' if skipped else ''})",
        file=sys.stderr,
    )


def _sort(
    writers: dict[Split, _SplitWriter], found: Iterator[_Checked], held_out: float
) -> list[str]:
    """Hands the images to the writers, a share to "validation"; returns those left out, and why."""
    skipped = []
    for one in found:
        if one.problem is not None:
            skipped.append(f"{one.place} {one.problem}")
        elif int.from_bytes(one.digest[:8], "little") < held_out * 2.0**64:
            writers["validation"].add(one)
        else:
            writers["train"].add(one)
    return skipped


class _SplitWriter:
    """Writes the files of one split, item after item."""

    def __init__(self, folder: LocalFolder, split: Split) -> None:
        self._folder, self._split = folder, split
        self._path = folder.temporary(f"{split}/items")
        self._file = open(self._path, "wb")  # noqa: SIM115 (closed by close)
        self._digest = hashlib.sha256()
        self.labels: list[int] = []
        self._ends: list[int] = []
        self._end = 0

    def add(self, one: _Checked) -> None:
        with writing(self._folder.path):
            self._file.write(one.item)
        self._end += len(one.item)
        self._ends.append(self._end)
        self.labels.append(one.label)
        self._digest.update(one.digest + one.label.to_bytes(4, "little"))

    def finish(self, source: ImageSource) -> dict[str, Any]:
        """Moves the files to their names; the fingerprint is of all images and labels in order."""
        with writing(self._folder.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._folder.publish(self._path, f"{self._split}/items")
        for kind, values, dtype in (("labels", self.labels, "<i4"), ("ends", self._ends, "<i8")):
            self._folder.write(f"{self._split}/{kind}", np.array(values, dtype).tobytes())
        images = open_images(source)
        return {
            "images": len(self.labels),
            "fingerprint": self._digest.hexdigest(),
            "shape": images.shape,
            "in_place": images.in_place,
            "source": source_json(source),
        }

    def close(self) -> None:
        self._file.close()


def source_json(source: ImageSource) -> dict[str, str]:
    """The fields that a store depends on; a path is absolute, as a run may start elsewhere."""
    fields = {name: value for name, value in vars(source).items() if name != "label_names"}
    if not source.path.startswith("tfds:"):
        fields["path"] = os.path.abspath(os.path.expanduser(source.path))
    return fields


def _check_classes(source: ImageSource, validation: ImageSource) -> None:
    train, held_out = open_images(source).classes, open_images(validation).classes
    if held_out != train[: len(held_out)]:
        raise UserError(
            f"The classes of {validation.path} ({validation.split}) are not those of "
            f"{source.path} ({source.split}); evaluate on images with the same classes."
        )


def _check_counts(
    source: ImageSource, counts: dict[Split, int], skipped: int, *, held_out: bool
) -> None:
    empty = [split for split in SPLITS if counts[split] == 0]
    if "train" in empty or (held_out and empty):
        raise UserError(
            f"No image of {source.path} is left for {empty[0]} ({sum(counts.values()):,} are "
            f"usable, {skipped:,} are not); check data.source and data.validation_fraction."
        )


def _checked(source: ImageSource, processes: int | None) -> Iterator[_Checked]:
    """All images of a source in order, with a bar on a terminal."""
    images = open_images(source)
    total = len(images)
    if images.shape is None:
        pillow()  # without it every image would be left out
    if processes is None:
        processes = 1 if total <= _FEW or images.shape is not None else cores()
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking images", total=total)
        for chunk in _chunks(source, range(0, total, _CHUNK), processes):
            yield from chunk
            bar.advance(task, len(chunk))


def _chunks(source: ImageSource, starts: range, processes: int) -> Iterator[list[_Checked]]:
    if processes == 1:
        for start in starts:
            yield check_images(source, start, start + _CHUNK)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, end_with_parent)
    waiting: deque[Future[list[_Checked]]] = deque()
    try:
        for start in starts:
            waiting.append(pool.submit(check_images, source, start, start + _CHUNK))
            if len(waiting) > 2 * processes:  # bounds what waits to be written
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A process that checks images died, perhaps for want of memory; run the same command "
            "again, with fewer prepare_processes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
