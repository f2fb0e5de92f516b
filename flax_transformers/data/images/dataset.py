"""Images for training: the settings, the preparation, the prepared data and its examples."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.base import Compare, DataConfig, DatasetDefaults, Tokenizers
from flax_transformers.data.images import parts
from flax_transformers.data.images.augmentation import Augmentation, augmented, centre_crop
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.sources import HELD_OUT, open_images, own_held_out
from flax_transformers.data.images.store import KIND, MANIFEST, ImageSplit, read_image_manifest
from flax_transformers.data.pipeline.examples import Examples, Subset
from flax_transformers.data.prepare.cached_stores import cache_directory
from flax_transformers.data.prepare.origin import (
    Origin,
    require_same_settings,
    require_same_source,
    source_settings,
    without_paths,
)
from flax_transformers.data.prepare.runner import StorePreparation, cores
from flax_transformers.data.store.files import StoreReader, digest
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.storage.file_hashes import NamedFiles, content_digest, sizes_digest
from flax_transformers.storage.folders import LocalFolder
from flax_transformers.storage.locks import exclusive_lock

DEFAULT_FRACTION = 0.02
"""Fraction held out by default if the source has no split for evaluation."""
_KNOWN, _KNOWN_BEFORE = "images with splits in any case", "images"
"""Names of the sources of default stores, and in versions that knew splits in lower case alone."""
_FEW = 8192  # images that one process checks faster than several start


@dataclass(frozen=True, kw_only=True)
class ImageData(DataConfig):
    """Images for training and evaluation. Image files are not copied into the store."""

    source: ImageSource
    """The images."""

    validation_source: ImageSource | None = None
    """Separate images for evaluation; then none of ``source`` are held out."""

    validation_fraction: float | None = None
    """Fraction of images held out for evaluation, chosen by a hash of their bytes: exact duplicates
    stay in one split. None: the source's "validation" or "test" split, or 0.02 of the images if it
    has neither. 0 holds out nothing."""

    channels: int = 3
    """3 for RGB, 1 for greyscale; other images are converted."""

    crop_fraction: float = 0.875
    """Fraction of an image's shorter side in the centre crop of evaluation, which is resized to the
    model's size; 1 for images that have that size already."""

    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random augmentation of training images."""

    shards: int = 64
    """Number of parts in which images are checked (fewer for few images), and so the unit of
    resumption. The content of the store does not depend on it."""

    RANGES: ClassVar[ranges.Ranges] = {"crop_fraction": ranges.numbers(0, 1, above=True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3):
            raise UserError(f"data.channels is {self.channels}; give 3 for RGB or 1 for greyscale")

    @property
    def image_channels(self) -> int:
        return self.channels

    @property
    def held_out(self) -> tuple[ImageSource | None, float]:
        """The source of images for evaluation, or else the fraction of ``source`` to hold out."""
        if self.validation_source is not None:
            return self.validation_source, 0.0
        if self.validation_fraction is not None:
            return None, self.validation_fraction
        own = own_held_out(self.source)
        if own is None:
            return None, DEFAULT_FRACTION
        return replace(self.source, split=own), 0.0

    @property
    def origin(self) -> Origin:
        """What the image store is made from."""
        defaults = ImageData(
            source=ImageSource(""),
            validation_source=None if self.validation_source is None else ImageSource(""),
        )
        return Origin(
            path=self.source.path,
            settings=self.store_settings() | {"shards": self.shards},
            defaults=defaults.store_settings() | {"shards": defaults.shards},
            sizes=partial(self._hash_of_all, sizes_digest),
            content=partial(self._hash_of_all, content_digest),
        )

    def store_settings(self) -> dict[str, Any]:
        """The settings that the content of the store depends on."""
        other = self.validation_source
        settings: dict[str, Any] = {
            "source": source_settings(self.source),
            "validation_source": None if other is None else source_settings(other),
            "validation_fraction": self.validation_fraction,
        }
        for source in (settings["source"], settings["validation_source"]):
            if source is not None:
                del source["label_names"]
                if not source["caption_field"]:  # as in older stores
                    del source["caption_field"]
        return without_paths(settings)

    def _hash_of_all(self, find: Callable[[NamedFiles], str]) -> str:
        validation, _ = self.held_out
        sources = [self.source, *([validation] if validation is not None else [])]
        return digest({"images": [find(open_images(one).files()) for one in sources]})

    def preparation(
        self,
        output: str | os.PathLike[str] | None = None,
        of_run: Tokenizers = MappingProxyType({}),
    ) -> ImagePreparation:
        open_images.cache_clear()  # files may have changed since they were opened
        origin = self.origin
        path = os.fspath(output or self.store or self._default_directory(origin))
        if "://" in path:
            raise UserError(f"An image store must be a local folder, and {path} is not; name one.")
        folder = LocalFolder(os.path.abspath(os.path.expanduser(path)))
        return ImagePreparation(folder=folder, origin=origin, shards=self.shards, data=self)

    def _default_directory(self, origin: Origin) -> str:
        def identity() -> str:
            return digest({"settings": self.store_settings(), "content": origin.content()})

        try:
            return cache_directory({_KNOWN: origin}, identity)
        except UserError:  # the source is gone
            return cache_directory({_KNOWN_BEFORE: origin}, identity)

    def former_stores(self, of_run: Tokenizers) -> Iterator[str]:
        def by_path() -> str:
            raise UserError("the folder that was used for the path before is asked for")

        with contextlib.suppress(UserError):
            folder = cache_directory({_KNOWN_BEFORE: self.origin}, by_path)
            if self.store is None and os.path.exists(os.path.join(folder, MANIFEST)):
                yield folder

    def of_evaluation_set(self, one: Any, label_names: tuple[str, ...] = ()) -> Any:
        # Images are numbered by the classes of their own source, which have to be the same.
        data = super().of_evaluation_set(one)
        if data.source.split != ImageSource.split:
            return data
        if own := own_held_out(data.source):
            return data._of_split(own)
        if os.path.exists(os.path.expanduser(data.source.path)):
            return data
        for split in map(data._of_split, HELD_OUT):  # the source is gone: the one with a store
            with contextlib.suppress(UserError):
                if split.preparation().is_finished():
                    return split
        return data

    def _of_split(self, split: str) -> ImageData:
        # The store has a name of its own: earlier versions scored the training split.
        store = self.store and f"{self.store}.{split}"
        return replace(self, source=replace(self.source, split=split), store=store)

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        if not isinstance(spec, ImageSpec):
            raise UserError(
                f"objective {objective} learns from text, but data is a {type(self).__name__}; "
                "choose another objective, or other data"
            )

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        image = np.zeros((spec.length, spec.length, self.channels), np.uint8)
        example: dict[str, np.ndarray] = {"image": image, "label": np.zeros((), np.int32)}
        return spec.with_other(example)


@dataclass(frozen=True)
class PreparedImages(DatasetDefaults):
    """Images in an image store (a `Dataset`). ``validation`` is None if nothing is held out."""

    directory: str
    data: ImageData
    label_names: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit | None
    classes: tuple[str, ...]
    """The source's own names of the classes, by which those of an evaluation set are compared."""

    tokenizer: ClassVar[None] = None

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    @property
    def summary(self) -> str:
        held_out = "none" if self.validation is None else f"{len(self.validation):,}"
        return (
            f"{len(self.train):,} training images of {len(self.label_names):,} classes, "
            f"{held_out} held out"
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """One entry for each class."""
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

    def verify(self) -> None:
        for split in filter(None, (self.train, self.validation)):
            split.verify()


@dataclass(frozen=True)
class ImageExamples(Examples):
    """One split as raw examples: ``image`` uint8 [side, side, channels] and ``label`` int32 [].

    Training images are augmented. With ``ImageSpec.other``, ``other_image`` and ``other_label`` are
    a random image of the split, or of ``others``, augmented with the same generator.
    """

    images: ImageSplit
    spec: ImageSpec
    data: ImageData
    training: bool
    others: np.ndarray | None = None
    """Indices, int64 [n]."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def plain(self) -> ImageExamples:
        return replace(self, training=False)

    def limited(self, chosen: np.ndarray) -> Subset:
        return Subset(replace(self, others=chosen), chosen)

    @property
    def classes(self) -> np.ndarray:
        return self.images.labels

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = {"image": self._image(index, rng), "label": self._label(index)}
        if self.training and self.spec.other:
            within = self.others
            other = int(rng.integers(len(self.images if within is None else within)))
            other = other if within is None else int(within[other])
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


@dataclass(frozen=True, kw_only=True)
class ImagePreparation(StorePreparation[PreparedImages, parts.ImageJob]):
    """How an image store is prepared: every image is checked once and its location noted.

    Images that cannot be decoded or have no label are left out, counted and named. Raises UserError
    if the source does not exist, nothing is held out although asked for, or the folder contains
    another store.
    """

    kind: ClassVar[str] = KIND
    manifest: ClassVar[str] = MANIFEST

    data: ImageData

    def count_processes(self, *, whole: bool) -> int:
        validation, _ = self.data.held_out
        if validation is not None:
            parts.check_classes(self.data.source, validation)
        opened = [open_images(one) for one in (self.data.source, validation) if one is not None]
        encoded = any(images.shape is None for images in opened)
        many = sum(len(images) for images in opened) > _FEW
        return self.data.prepare_processes or (cores() if encoded and many else 1)

    def begin_job(self, claimed: dict[str, Any], processes: int) -> parts.ImageJob:
        return self.resume_job(claimed)

    def resume_job(self, claimed: dict[str, Any]) -> parts.ImageJob:
        validation, fraction = self.data.held_out
        return parts.ImageJob(
            self.folder, self.data.source, validation, fraction, self.data.shards, claimed
        )

    def write_share(self, job: parts.ImageJob, number: int, jobs: int, processes: int) -> None:
        parts.write_parts(job, range(number, len(job.parts()), jobs), processes)

    def is_complete(self, job: parts.ImageJob) -> bool:
        return not parts.missing_parts(job)

    def finish(self, job: parts.ImageJob, processes: int) -> None:
        parts.finish_store(job, processes, self.origin, self.data.store_settings())

    def run(self, compare: Compare = "sizes") -> PreparedImages:
        # Parts are left if the job that finished the store was killed.
        if self.is_finished() and parts.has_parts(self.folder):
            with exclusive_lock(self.folder):
                parts.remove_parts(self.folder)
        return super().run(compare)

    def read_store(self, *, verified: bool, compare: Compare) -> PreparedImages:
        open_images.cache_clear()  # training does not need what preparation opened
        data, folder = self.data, self.folder
        manifest = read_image_manifest(folder)
        try:
            settings = {**manifest["origin"], "shards": data.shards}
            classes = tuple(map(str, manifest["classes"]))
        except (KeyError, TypeError) as error:
            raise StoreReader(folder, KIND).damaged(MANIFEST, f"it has no {error}") from error
        require_same_settings(folder, {"settings": settings}, self.origin)
        require_same_source(folder, manifest.get("corpus", {}), self.origin, compare)
        names = data.source.label_names or classes
        if len(names) != len(classes):
            raise UserError(
                f"data.source.label_names has {len(names)} names, but there are {len(classes)} "
                "classes; name all of them."
            )
        held_out = data.validation_source or data.source
        train = ImageSplit(folder.path, "train", manifest, data.source.path)
        validation = ImageSplit(folder.path, "validation", manifest, held_out.path)
        if data.verify and not verified:
            train.verify()
            validation.verify()
        return PreparedImages(
            folder.path, data, names, train, validation if len(validation) else None, classes
        )
