"""Checks images in parts, and builds the image store from them.

Files in the order in which they are written (see `prepare.runner`):

    corpus.json     what the parts are made from
    parts/N.items   the items of the images of part N, concatenated
    parts/N.npz     their labels, the end of each item, hashes of the images, and which are left out
    parts/N.json    checksums of both files, written after them
    manifest.json   last, after every part was verified; then the parts are removed
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flax_transformers.data.images.decode import UnreadableImage, decode_image, pillow
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.sources import open_images
from flax_transformers.data.images.store import (
    FORMAT,
    MANIFEST,
    SKIPPED,
    caption_bytes,
    image_digest,
    source_json,
)
from flax_transformers.data.prepare.origin import Origin, require_unchanged
from flax_transformers.data.prepare.runner import read_record
from flax_transformers.data.prepare.workers import Note, for_each_run
from flax_transformers.data.store.files import StoreArray, StoreReader, digest, record_json, sealed
from flax_transformers.data.store.token_store import SPLITS, Split
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import HashedFile, record_of
from flax_transformers.storage.folders import Folder, writing_below

_PARTS = "parts/"
_LEAST = 512  # images per part at least
_BLOCK = 64  # images between progress reports


@dataclass(frozen=True)
class ImageJob:
    """What checking a part takes. ``claimed`` is the record of `origin.claim`.

    ``validation``: a separate source for evaluation; without it, ``fraction`` of the images are
    held out by a hash of their bytes, so that equal images stay in one split.
    """

    folder: Folder
    source: ImageSource
    validation: ImageSource | None
    fraction: float
    shards: int
    claimed: dict[str, Any]

    @property
    def made_from(self) -> str:
        """What a part has to be made from to count as finished."""
        return digest(self.claimed)

    def parts(self) -> list[tuple[ImageSource, int, int]]:
        """Source, first image and end of each part; parts for evaluation come last."""
        sources = [self.source] if self.validation is None else [self.source, self.validation]
        parts: list[tuple[ImageSource, int, int]] = []
        for source in sources:
            total = len(open_images(source))
            count = min(self.shards, -(-total // _LEAST))
            ends = [total * part // count for part in range(count + 1)] if count else []
            parts += [(source, ends[part], ends[part + 1]) for part in range(count)]
        return parts


class _Part(NamedTuple):
    """A finished part: images in order; those left out have an empty item."""

    items: StoreArray
    ends: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    skipped: list[str]
    """A line for each image that is left out."""
    usable: np.ndarray
    captions: list[bytes]
    """Of each image, as the store has them; empty for images with labels."""

    def images(self) -> Iterator[tuple[np.ndarray, int, bytes, bytes]]:
        """Item, label, hash and captions of the images that are not left out."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends])
        for number in np.flatnonzero(self.usable):
            item = self.items.read(int(starts[number]), int(starts[number + 1]))
            captions = self.captions[number] if self.captions else b""
            yield item, int(self.labels[number]), self.digests[number].tobytes(), captions


def check_part(job: ImageJob, number: int, note: Note) -> None:
    """Reads and decodes the images of one part, and writes what the store keeps of them."""
    source, start, stop = job.parts()[number]
    images = open_images(source)
    labels, ends, digests, usable, skipped, captions = [], [], [], [], [], []
    path = job.folder.temporary(f"{_name(number)}.items")
    with writing_below(job.folder.path):
        file = HashedFile(path)
        for count, (place, raw, label, texts) in enumerate(images.read(start, stop), 1):
            problem = _problem(raw, label, len(images.classes), images.shape is None)
            if source.caption_field:
                problem = problem if texts or problem else "has no caption"
                captions.append(caption_bytes(texts))
            if problem is not None:
                skipped.append(f"{place} {problem}")
            elif images.in_place:
                file.write(place.encode("utf-8", "surrogateescape"))
            else:
                file.write(raw)
            ends.append(file.size)
            labels.append(label)
            usable.append(problem is None)
            digests.append(np.frombuffer(image_digest(raw), np.uint8))
            if count % _BLOCK == 0 or start + count == stop:
                note((count - 1) % _BLOCK + 1, 0)
        items = file.finish(lasting=True)
    job.folder.publish(path, f"{_name(number)}.items")
    arrays = io.BytesIO()
    np.savez(
        arrays,
        labels=np.array(labels, np.int64),
        ends=np.array(ends, np.int64),
        digests=np.array(digests, np.uint8).reshape(-1, 16),
        usable=np.array(usable, bool),
        skipped=np.frombuffer(json.dumps(skipped).encode(), np.uint8),
        captions=np.frombuffer(b"".join(captions), np.uint8),
        caption_ends=np.cumsum([len(each) for each in captions], dtype=np.int64),
    )
    job.folder.write(f"{_name(number)}.npz", arrays.getvalue())
    record = {
        "made_from": job.made_from,
        "items": items.sha256,
        "arrays": record_of([arrays.getvalue()]).sha256,
    }
    job.folder.write(f"{_name(number)}.json", record_json(record))


def _problem(raw: bytes, label: int, classes: int, encoded: bool) -> str | None:
    """Why an image is left out; None if it is not."""
    if not 0 <= label < classes:
        return "has no label"
    if encoded:
        try:
            decode_image(raw, channels=3)
        except UnreadableImage as error:
            return str(error)
    return None


def _name(number: int) -> str:
    return f"{_PARTS}{number:05d}"


def missing_parts(job: ImageJob) -> list[int]:
    """Numbers of the parts that are missing or were made from something else."""
    return [number for number in range(len(job.parts())) if _record(job, number) is None]


def _record(job: ImageJob, number: int) -> dict[str, Any] | None:
    return read_record(job.folder, f"{_name(number)}.json", job.made_from)


def write_parts(job: ImageJob, parts: Sequence[int], processes: int) -> None:
    """Writes those of ``parts`` that are missing."""
    if any(open_images(source).shape is None for source, _, _ in job.parts()):
        pillow()  # raises if it is not installed, rather than leaving out every image
    missing = [number for number in missing_parts(job) if number in set(parts)]
    work, runs = partial(_check_parts, job), [[number] for number in missing]
    for_each_run(work, runs, processes, done="checked", total=len(parts), unit="images")


def _check_parts(job: ImageJob, numbers: Sequence[int], note: Note) -> None:
    for number in numbers:
        check_part(job, number, note)
        note(shards=1)


def finish_store(job: ImageJob, processes: int, origin: Origin, settings: dict[str, Any]) -> None:
    """Verifies all parts and builds the store from them. Raises UserError if a split is empty, and
    if the images changed since the folder was reserved.

    A part whose files do not match their checksums is written once more.
    """
    folder, classes = job.folder, open_images(job.source).classes
    with writing_below(folder.path):
        writers = {split: _SplitWriter(folder, split) for split in SPLITS}
    skipped = []
    try:
        for number, (source, _, _) in enumerate(job.parts()):
            part = _read_or_make(job, number, processes)
            share = 1.0 if source is job.validation else job.fraction
            for item, label, found, captions in part.images():
                held_out = int.from_bytes(found[:8], "little") < share * 2.0**64
                writers["validation" if held_out else "train"].add(item, label, found, captions)
            skipped += part.skipped
        counts = {split: len(writer.labels) for split, writer in writers.items()}
        _check_counts(job, counts, len(skipped))
        require_unchanged(folder, origin, job.claimed)
        origins = {"train": job.source, "validation": job.validation or job.source}
        splits = {split: writers[split].finish(origins[split]) for split in SPLITS}
    finally:
        for writer in writers.values():
            writer.close()
    folder.write(SKIPPED, "".join(f"{line}\n" for line in skipped).encode("utf-8", "replace"))
    manifest = {
        "format": FORMAT,
        "origin": settings,
        "corpus": {"sizes": job.claimed["sizes"]},
        "classes": list(classes),
        "skipped": len(skipped),
        "splits": splits,
    }
    folder.write(MANIFEST, sealed(manifest))
    remove_parts(folder)
    print(
        f"Prepared {counts['train']:,} training and {counts['validation']:,} held-out images of "
        f"{len(classes)} classes in {folder.path} (left out: {len(skipped):,}"
        f"{'; see ' + SKIPPED + ' there' if skipped else ''})",
        file=sys.stderr,
    )


def has_parts(folder: Folder) -> bool:
    """Whether parts exist, which a finished store has only if its last job was killed."""
    return bool(folder.names(_PARTS))


def remove_parts(folder: Folder) -> None:
    """Removes the parts; a finished store does not need them."""
    for name in folder.names(_PARTS):
        folder.delete(name)


def _read_or_make(job: ImageJob, number: int, processes: int) -> _Part:
    try:
        return _read(job, number)
    except UserError as error:
        print(f"Checking part {number + 1} again: {error}", file=sys.stderr)
        job.folder.delete(f"{_name(number)}.json")
        write_parts(job, [number], processes)
        return _read(job, number)


def _read(job: ImageJob, number: int) -> _Part:
    """A verified part. Raises UserError if it is missing or damaged."""
    record, name = _record(job, number), _name(number)
    store = StoreReader(job.folder, "unfinished image store")
    try:
        if record is None:
            raise FileNotFoundError(f"{job.folder.path}/{name}.json")
        arrays = job.folder.read(f"{name}.npz")
    except OSError as error:
        raise UserError(f"{job.folder.path}/{name} cannot be read ({error}).") from error
    written = store.record(f"{name}.items")
    found = {"items": written.sha256, "arrays": record_of([arrays]).sha256}
    for kind, sha256 in found.items():
        if sha256 != record[kind]:
            raise UserError(f"{job.folder.path}/{name} does not match its recorded sha256.")
    items = store.array(f"{name}.items", "u1", written.bytes)
    with np.load(io.BytesIO(arrays)) as loaded:
        skipped = json.loads(loaded["skipped"].tobytes())
        named = {kind: loaded[kind] for kind in ("ends", "labels", "digests", "usable")}
        texts = loaded["captions"].tobytes() if "captions" in loaded else b""
        ends = loaded["caption_ends"].tolist() if texts else []
    captions = [texts[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return _Part(items=items, skipped=skipped, captions=captions, **named)


class _SplitWriter:
    """Writes the files of one split, item after item."""

    def __init__(self, folder: Folder, split: Split) -> None:
        self._folder, self._split = folder, split
        self._items = HashedFile(folder.temporary(f"{split}/items"))
        self._fingerprint = hashlib.sha256()
        self.labels: list[int] = []
        self._ends: list[int] = []
        self._digests = bytearray()
        self._captions = HashedFile(folder.temporary(f"{split}/captions"))
        self._caption_ends: list[int] = []

    def add(self, item: np.ndarray, label: int, digest: bytes, captions: bytes) -> None:
        with writing_below(self._folder.path):
            self._items.write(item.data)
            self._captions.write(captions)
        self._caption_ends.append(self._captions.size)
        self._ends.append(self._items.size)
        self.labels.append(label)
        self._digests += digest
        self._fingerprint.update(digest + label.to_bytes(4, "little") + captions)

    def finish(self, source: ImageSource) -> dict[str, Any]:
        """Moves the files to their names and returns the manifest's entry of the split. The
        fingerprint is of all images and labels in order."""
        with writing_below(self._folder.path):
            files = {"items": asdict(self._items.finish(lasting=True))}
        self._folder.publish(self._items.path, f"{self._split}/items")
        images, captioned = open_images(source), bool(source.caption_field)
        if captioned:
            with writing_below(self._folder.path):
                files["captions"] = asdict(self._captions.finish(lasting=True))
            self._folder.publish(self._captions.path, f"{self._split}/captions")
        contents = {
            "labels": np.array(self.labels, "<i4").tobytes(),
            "ends": _ends(self._ends),
            **({"digests": bytes(self._digests)} if images.in_place else {}),
            **({"caption_ends": _ends(self._caption_ends)} if captioned else {}),
        }
        for kind, content in contents.items():
            self._folder.write(f"{self._split}/{kind}", content)
            files[kind] = asdict(record_of([content]))
        return {
            "images": len(self.labels),
            "fingerprint": self._fingerprint.hexdigest(),
            "files": files,
            "shape": images.shape,
            "in_place": images.in_place,
            "source": source_json(source),
        }

    def close(self) -> None:
        """Removes the files of items and captions unless they were finished."""
        self._items.discard()
        self._captions.discard()


def _ends(ends: Sequence[int]) -> bytes:
    return np.array(ends, "<i8").tobytes()


def check_classes(source: ImageSource, validation: ImageSource) -> None:
    """Raises UserError if the images for evaluation have other classes."""
    train, held_out = open_images(source).classes, open_images(validation).classes
    if held_out != train[: len(held_out)]:
        raise UserError(
            f"The classes of {validation.path} ({validation.split}) are not those of "
            f"{source.path} ({source.split}); evaluate on images with the same classes."
        )


def _check_counts(job: ImageJob, counts: dict[Split, int], skipped: int) -> None:
    held_out = job.validation is not None or job.fraction > 0
    empty = [split for split in SPLITS if counts[split] == 0]
    if "train" in empty or (held_out and empty):
        raise UserError(
            f"No image of {job.source.path} is left for {empty[0]} ({sum(counts.values()):,} are "
            f"usable, {skipped:,} are not); check data.source and data.validation_fraction."
        )
