"""Images for training: the settings, the prepared data, and examples cut out of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.config import DataConfig
from flax_transformers.data.images.augmentation import Augmentation, augmented, centre_crop
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.parts import (
    ImageJob,
    check_classes,
    finish,
    has_parts,
    missing_parts,
    remove_parts,
    write_parts,
)
from flax_transformers.data.images.sources import open_images, own_held_out
from flax_transformers.data.images.store import KIND, MANIFEST, ImageSplit, read_manifest
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.prepare.cached_stores import cache_directory
from flax_transformers.data.prepare.store_locks import (
    Compare,
    Corpus,
    claim,
    refuse_changed,
    refuse_other,
    source_settings,
    without_paths,
)
from flax_transformers.data.prepare.text import cores
from flax_transformers.data.prepare.workers import require_job
from flax_transformers.data.store.files import StoreReader, digest
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.ranges import Ranges
from flax_transformers.storage.file_hashes import NamedFiles, content_digest, sizes_digest
from flax_transformers.storage.folders import LocalFolder
from flax_transformers.storage.locks import exclusive_lock, shared_lock

DEFAULT_FRACTION = 0.02
"""Held out where the source has no split for it and nothing else is said."""
_FEW = 8192  # images that are not worth starting processes for


@dataclass(frozen=True, kw_only=True)
class ImageData(DataConfig):
    """Images for training and for evaluation. Large collections are read where they lie."""

    source: ImageSource
    """The images."""

    validation_source: ImageSource | None = None
    """Images of their own for evaluation; then none of ``source`` are held out."""

    validation_fraction: float | None = None
    """Share of images held out for evaluation, drawn by a hash of their bytes: exact duplicates
    stay on one side. None: the source's own "validation" or "test" split, and 0.02 of the images
    where it has neither. 0 holds out nothing."""

    channels: int = 3
    """3 for colour, 1 for grey; images of the other kind are converted."""

    crop_fraction: float = 0.875
    """How much of an image's shorter side evaluation sees, resized to the model's size; 1 for
    images that have that size already."""

    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random changes to training images."""

    shards: int = 64
    """Parts in which images are checked (fewer of few images), and so the unit of resumption. What
    the store holds does not depend on it."""

    RANGES: ClassVar[Ranges] = {"crop_fraction": ranges.numbers(0, 1, above=True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3):
            raise UserError(f"data.channels is {self.channels}; give 3 for colour or 1 for grey")


@dataclass(frozen=True)
class PreparedImages:
    """Images in an image store (a `Dataset`). ``validation`` is None where nothing is held out."""

    directory: str
    data: ImageData
    label_names: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit | None

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    @property
    def known_as(self) -> tuple[str, ...]:
        return ()

    @property
    def summary(self) -> str:
        held_out = "none" if self.validation is None else f"{len(self.validation):,}"
        return (
            f"{len(self.train):,} training images of {len(self.label_names):,} classes, "
            f"{held_out} held out"
        )

    @property
    def tokenizer(self) -> None:
        return None

    @property
    def target_tokenizer(self) -> None:
        return None

    @property
    def vocabulary(self) -> Vocabulary:
        """As many entries as there are classes."""
        return Vocabulary(size=len(self.label_names), pad_id=0)

    def examples(self, split: Split, spec: WindowSpec) -> ImageExamples | None:
        images = self.train if split == "train" else self.validation
        if images is None:
            return None
        if not isinstance(spec, ImageSpec):
            raise UserError(
                "the objective learns from text, but data are images; choose an objective for "
                "images, such as ImageClassification, or other data"
            )
        return ImageExamples(images, spec, self.data, training=split == "train")


@dataclass(frozen=True)
class ImageExamples(Examples):
    """One split as raw examples: ``image`` uint8 [side, side, channels] and ``label`` int32 [].

    In training images are augmented, and with ``ImageSpec.other`` come ``other_image`` and
    ``other_label``, any image of the split, drawn and augmented with the same generator.
    """

    images: ImageSplit
    spec: ImageSpec
    data: ImageData
    training: bool

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = {"image": self._image(index, rng), "label": self._label(index)}
        if self.training and self.spec.other:
            other = int(rng.integers(len(self.images)))
            example["other_image"] = self._image(other, rng)
            example["other_label"] = self._label(other)
        return example

    def _image(self, index: int, rng: np.random.Generator) -> np.ndarray:
        pixels = self.images.pixels(index, self.data.channels)
        side, fraction = self.spec.length, self.data.crop_fraction
        if not self.training:
            return centre_crop(pixels, side, fraction)
        return augmented(pixels, side, self.data.augmentation, fraction, rng)

    def _label(self, index: int) -> np.ndarray:
        return np.array(self.images.labels[index], np.int32)


def prepare_images(
    data: ImageData,
    output: str | os.PathLike[str] | None = None,
    *,
    processes: int | None = None,
    compare: Compare = "sizes",
) -> PreparedImages:
    """Checks every image of ``data`` once and notes where it is, or opens what was prepared.

    ``output`` goes before ``data.store``, ``processes`` before ``data.prepare_processes``. Safe to
    kill and to call again; a store is finished when its manifest is there. Images that cannot be
    decoded or have no label are left out, counted and named. A finished store is enough; with
    ``compare`` images that are at hand must have the same names and sizes. Raises UserError for a
    source that is not there, nothing to hold out, and a folder that holds another store.
    """
    folder, made = _folder(data, output), False
    if not folder.exists(MANIFEST):
        with exclusive_lock(folder):
            made = not folder.exists(MANIFEST)
            if made:
                job = _begun(folder, data)
                count = processes or _processes(job, data)
                write_parts(job, range(len(job.parts())), count)
                finish(job, count, _corpus_of(data), _origin(data))
    if not made and has_parts(folder):
        with exclusive_lock(folder):
            remove_parts(folder)
    return _open(folder, data, verified=made, compare="nothing" if made else compare)


def begin_images(data: ImageData, output: str | os.PathLike[str] | None = None) -> None:
    """Claims the folder for these images, so that jobs with others are refused."""
    folder = _folder(data, output)
    if not folder.exists(MANIFEST):
        with exclusive_lock(folder):
            _begun(folder, data)


def prepare_image_parts(
    data: ImageData, output: str | os.PathLike[str] | None, job: int, jobs: int
) -> PreparedImages | None:
    """One job's share of the parts in which images are checked: those whose number % jobs == job.

    The job that finishes the last part also finishes the store, and it is given out; before, None.
    A job may be killed and run again, or twice at once. Raises UserError where there are more jobs
    than shards, and as `prepare_images` does.
    """
    require_job(job, jobs, data.shards)
    folder = _folder(data, output)
    if not folder.exists(MANIFEST):
        with shared_lock(folder):
            if folder.exists(MANIFEST):  # finished by another while this one waited
                return _open(folder, data)
            work = _begun(folder, data, by_size=True)
            count = _processes(work, data)
            write_parts(work, range(job, len(work.parts()), jobs), count)
        if missing_parts(work) and not folder.exists(MANIFEST):
            return None
        with exclusive_lock(folder):
            if not folder.exists(MANIFEST):
                finish(work, count, _corpus_of(data), _origin(data))
    return _open(folder, data)


def _begun(folder: LocalFolder, data: ImageData, *, by_size: bool = False) -> ImageJob:
    """Claims the folder; all that checking a part takes."""
    validation, fraction = _held_out(data)
    if validation is not None:
        check_classes(data.source, validation)
    claimed = claim(folder, _corpus_of(data), by_size=by_size)
    return ImageJob(folder, data.source, validation, fraction, data.shards, claimed)


def _processes(job: ImageJob, data: ImageData) -> int:
    """As many as asked for, or as there are cores where there is something to decode."""
    encoded = any(open_images(source).shape is None for source, _, _ in job.parts())
    many = sum(stop - start for _, start, stop in job.parts()) > _FEW
    return data.prepare_processes or (cores() if encoded and many else 1)


def open_prepared_images(data: ImageData) -> PreparedImages:
    """The finished store of ``data``. Raises UserError where there is none."""
    folder = _folder(data, None)
    if not folder.exists(MANIFEST):
        raise UserError(
            f"There is no finished image store in {folder.path}; run `flax-transformers prepare` "
            "with the same config first, in one process."
        )
    return _open(folder, data)


def _folder(data: ImageData, output: str | os.PathLike[str] | None) -> LocalFolder:
    open_images.cache_clear()  # files may have changed since they were opened
    path = os.fspath(output or data.store or _default_directory(data))
    if "://" in path:
        raise UserError(f"An image store is a local folder, which {path} is not; name another.")
    return LocalFolder(os.path.abspath(path))


def _default_directory(data: ImageData) -> str:
    """Below the user's cache directory, named after the images and the settings."""
    corpus = _corpus_of(data)

    def identity() -> str:
        return digest({"settings": _origin(data), "content": corpus.content()})

    return cache_directory({"images": corpus}, identity)


def _corpus_of(data: ImageData) -> Corpus:
    """What the image store of ``data`` is made from."""
    defaults = ImageData(
        source=ImageSource(""),
        validation_source=None if data.validation_source is None else ImageSource(""),
    )
    return Corpus(
        path=data.source.path,
        settings=_origin(data) | {"shards": data.shards},
        defaults=_origin(defaults) | {"shards": defaults.shards},
        sizes=partial(_of_sources, data, sizes_digest),
        content=partial(_of_sources, data, content_digest),
    )


def _of_sources(data: ImageData, find: Callable[[NamedFiles], str]) -> str:
    validation, _ = _held_out(data)
    sources = [data.source, *([validation] if validation is not None else [])]
    return digest({"images": [find(open_images(one).files()) for one in sources]})


def _held_out(data: ImageData) -> tuple[ImageSource | None, float]:
    """The source of images for evaluation, or else the share of ``source`` that is held out."""
    if data.validation_source is not None:
        return data.validation_source, 0.0
    if data.validation_fraction is not None:
        return None, data.validation_fraction
    own = own_held_out(data.source)
    if own is None:
        return None, DEFAULT_FRACTION
    fields = {**vars(data.source), "split": own}
    return ImageSource(**fields), 0.0


def _origin(data: ImageData) -> dict[str, Any]:
    """The settings that what a store holds depends on."""
    other = data.validation_source
    settings: dict[str, Any] = {
        "source": source_settings(data.source),
        "validation_source": None if other is None else source_settings(other),
        "validation_fraction": data.validation_fraction,
    }
    for source in (settings["source"], settings["validation_source"]):
        if source is not None:
            del source["label_names"]
    return without_paths(settings)


def _open(
    folder: LocalFolder, data: ImageData, *, verified: bool = False, compare: Compare = "nothing"
) -> PreparedImages:
    open_images.cache_clear()  # what was opened to prepare is not needed to train
    manifest = read_manifest(folder)
    try:
        origin = {"settings": {**manifest["origin"], "shards": data.shards}}
        classes = tuple(map(str, manifest["classes"]))
    except (KeyError, TypeError) as error:
        raise StoreReader(folder, KIND).damaged(MANIFEST, f"it has no {error}") from error
    refuse_other(folder, origin, _corpus_of(data))
    refuse_changed(folder, manifest.get("corpus", {}), _corpus_of(data), compare)
    names = data.source.label_names or classes
    if len(names) != len(classes):
        raise UserError(
            f"data.source.label_names has {len(names)} names, but there are {len(classes)} "
            "classes; name them all."
        )
    held_out = data.validation_source or data.source
    train = ImageSplit(folder.path, "train", manifest, data.source.path)
    validation = ImageSplit(folder.path, "validation", manifest, held_out.path)
    if data.verify and not verified:
        train.verify()
        validation.verify()
    return PreparedImages(
        folder.path,
        data,
        names,
        train,
        validation if len(validation) else None,
    )
