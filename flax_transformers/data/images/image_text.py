"""Pairs of images and texts for training: the settings, the prepared data and its examples.

Images and captions are in an image store (``store``). Captions are tokenized when they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.base import Compare, DatasetDefaults, Tokenizers
from flax_transformers.data.images import dataset
from flax_transformers.data.images.store import ImageSplit
from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import Split
from flax_transformers.data.store.tokenizer import (
    is_saved,
    load_saved_tokenizer,
    save_tokenizer,
)
from flax_transformers.data.tokenizers.fitting import padded_vocabulary
from flax_transformers.data.tokenizers.load import Tokenizer, TokenizerConfig, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.contrastive import ImageTextSpec
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.storage.locks import exclusive_lock

NAME = "{}"
"""Where the name of the class is in a template."""


@dataclass(frozen=True)
class ClassTexts:
    """Texts of the classes of labelled images: each name in each template.

    ``class_names``: in the order of the labels; default: the names that the source has.
    ``templates``: such as "a photo of a {}.". ``name``: of the set of texts, such as its language.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = (NAME,)
    name: str = ""

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.captions")
        wrong = next((text for text in self.templates if NAME not in text), None)
        if wrong is not None or not self.templates:
            raise UserError(
                f"templates of class texts are {list(self.templates)}; give at least one, each "
                f"with {NAME} in place of the name of the class"
            )

    def of(self, label: int, template: int) -> str:
        """The text of a class."""
        return self.templates[template].replace(NAME, self.class_names[label])

    def all(self) -> list[list[str]]:
        """The texts of each class."""
        return [
            [self.of(label, template) for template in range(len(self.templates))]
            for label in range(len(self.class_names))
        ]

    def named(self, classes: tuple[str, ...]) -> ClassTexts:
        """With the names of ``classes`` by default. Raises UserError for another number."""
        names = self.class_names or classes
        if len(names) != len(classes):
            raise UserError(
                f"the class texts {self.name!r} have {len(names)} class_names, but the images have "
                f"{len(classes)} classes; name each of them"
            )
        return replace(self, class_names=names)


@dataclass(frozen=True, kw_only=True)
class ImageTextData(dataset.ImageData):
    """Images and their captions: of a source with a ``caption_field``, or made from labels.

    Training draws one of the captions of an image in each epoch; evaluation takes the first.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Trained on the captions of training, or loaded."""

    captions: tuple[ClassTexts, ...] = ()
    """Captions of labelled images: a random template of a random set, such as a language."""

    zero_shot: tuple[ClassTexts, ...] = ()
    """Score the classification of held-out images by these texts of the classes, each set by
    itself."""

    zero_shot_data: dataset.ImageData | None = None
    """Labelled images for ``zero_shot``. Default: those of this data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.captions) == bool(self.source.caption_field):
            raise UserError(
                "captions come either from data.source.caption_field or, of labelled images, from "
                "data.captions; set one of them"
            )
        if self.zero_shot and self.zero_shot_data is None and self.source.caption_field:
            raise UserError(
                "data.zero_shot classifies labelled images, and these have captions; set "
                "data.zero_shot_data to an ImageData with labels"
            )
        names = [texts.name for texts in self.zero_shot]
        if len(set(names)) < len(names):
            raise UserError(
                f"the class texts of data.zero_shot are named {', '.join(map(repr, names))}; give "
                "each its own name, which the names of its scores end with"
            )

    @property
    def tokenizers(self) -> dict[str, TokenizerConfig]:
        return {"tokenizer": self.tokenizer}

    def preparation(  # type: ignore[override]
        self,
        output: str | os.PathLike[str] | None = None,
        of_run: Tokenizers = MappingProxyType({}),
    ) -> PairPreparation:
        return PairPreparation(super().preparation(output), self, of_run.get("tokenizer"))

    def of_evaluation_set(self, one: Any, label_names: tuple[str, ...] = ()) -> Any:
        # Everything of a set is scored, so that it holds out no images to classify.
        return replace(super().of_evaluation_set(one), zero_shot=(), zero_shot_data=None)

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        if not isinstance(spec, ImageTextSpec):
            raise UserError(
                f"objective {objective} does not learn from pairs of images and texts, which the "
                f"{type(self).__name__} gives; choose ImageTextContrastive, or other data"
            )

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        side = spec.image_size if isinstance(spec, ImageTextSpec) else spec.length
        example = super().dummy_example(ImageSpec(side), token)
        return example | {"tokens": np.full(1, token, np.int32)}


@dataclass(frozen=True)
class PairPreparation:
    """How an image store and its tokenizer are prepared (a `Preparation`).

    A tokenizer that is trained is saved in the store, in a folder named by its settings.
    ``of_run``: the tokenizer of a run, used instead of training one.
    """

    images: dataset.ImagePreparation
    data: ImageTextData
    of_run: Tokenizer | None = None

    def check(self) -> None:
        """See `Preparation`."""
        self.images.check()
        if self.data.zero_shot_data is not None:
            self.data.zero_shot_data.preparation().check()

    def run(self, compare: Compare = "sizes") -> PreparedPairs:
        """See `Preparation`."""
        return self._with_tokenizer(self.images.run(compare), compare, may_train=True)

    def is_finished(self) -> bool:
        """See `Preparation`."""
        return self.images.is_finished()

    def begin(self) -> None:
        """See `Preparation`."""
        self.images.begin()

    def share(self, job: int, jobs: int) -> PreparedPairs | None:
        """See `Preparation`. The job that finishes last trains the tokenizer."""
        found = self.images.share(job, jobs)
        return None if found is None else self._with_tokenizer(found, "sizes", may_train=True)

    def open(self, compare: Compare = "nothing") -> PreparedPairs:
        """See `Preparation`."""
        return self._with_tokenizer(self.images.open(compare), compare, may_train=False)

    def _with_tokenizer(
        self, images: dataset.PreparedImages, compare: Compare, *, may_train: bool
    ) -> PreparedPairs:
        data = self.data
        captions = tuple(each.named(images.label_names) for each in data.captions)
        labelled = images
        if data.zero_shot_data is not None:
            preparation = data.zero_shot_data.preparation()
            labelled = preparation.run(compare) if may_train else preparation.open(compare)
        named = tuple(each.named(labelled.label_names) for each in data.zero_shot)
        data = replace(data, captions=captions, zero_shot=named)
        tokenizer = self._tokenizer(data, images.train, may_train)
        held_out = labelled.validation if data.zero_shot else None
        if data.zero_shot and held_out is None:
            raise UserError(
                "data.zero_shot needs held-out images with classes, and the data has none; set "
                "data.zero_shot_data, or hold out images with --data.validation-fraction"
            )
        return PreparedPairs(
            images.directory, data, images.train, images.validation, tokenizer, held_out
        )

    def _tokenizer(self, data: ImageTextData, train: ImageSplit, may_train: bool) -> Tokenizer:
        config, folder = data.tokenizer, self.images.folder
        if not config.needs_training:
            return train_tokenizer(config, ())
        if self.of_run is not None:
            return self.of_run
        name = f"tokenizer-{digest(config.settings)[:12]}"
        name += digest({"texts": [each.all() for each in data.captions]})[:4]
        if not is_saved(folder, name):
            if not may_train:
                raise UserError(self.images.no_store())
            with exclusive_lock(folder):
                if not is_saved(folder, name):
                    trained = train_tokenizer(config, _texts(data, train))
                    save_tokenizer(folder, trained, name)
        return load_saved_tokenizer(folder, name)


def _texts(data: ImageTextData, train: ImageSplit) -> Iterator[str]:
    """All captions of training."""
    for each in data.captions:
        for texts in each.all():
            yield from texts
    for index in range(len(train) if train.has_captions else 0):
        yield from train.captions(index)


@dataclass(frozen=True)
class PreparedPairs(DatasetDefaults):
    """Images and captions in an image store (a `Dataset`). ``validation`` is None if nothing is
    held out; ``labelled`` are images for ``ImageTextData.zero_shot``, None without."""

    directory: str
    data: ImageTextData
    train: ImageSplit
    validation: ImageSplit | None
    tokenizer: Tokenizer
    labelled: ImageSplit | None
    known: Vocabulary | None = None
    """The part of the vocabulary that the model has embeddings for, if it is not all."""

    label_names: ClassVar[tuple[str, ...]] = ()

    @property
    def fingerprint(self) -> str:
        captions = [each.all() for each in self.data.captions]
        parts = [self.train.fingerprint, self.tokenizer.fingerprint, captions]
        return digest({"pairs": parts})

    @property
    def summary(self) -> str:
        held_out = "none" if self.validation is None else f"{len(self.validation):,}"
        return (
            f"{len(self.train):,} training pairs of images and texts, {held_out} held out, "
            f"{self.tokenizer.kind} with a vocabulary of {self.vocabulary.size:,}"
        )

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary if self.known is None else self.known

    def fitted(self, vocab_size: int, pad_id: int, target_vocab_size: int) -> PreparedPairs:
        known = padded_vocabulary(self.vocabulary, vocab_size, pad_id)
        return self if known == self.vocabulary else replace(self, known=known)

    def examples(self, split: Split, spec: WindowSpec) -> PairedExamples | None:
        images = self.train if split == "train" else self.validation
        if images is None:
            return None
        self.data.check_objective("of the run", spec)
        assert isinstance(spec, ImageTextSpec)
        return PairedExamples(
            dataset.ImageExamples(images, ImageSpec(spec.image_size), self.data, split == "train"),
            self.data,
            self.tokenizer,
        )

    def verify(self) -> None:
        labelled = None if self.data.zero_shot_data is None else self.labelled
        for split in filter(None, (self.train, self.validation, labelled)):
            split.verify()


@dataclass(frozen=True)
class PairedExamples(Examples):
    """One split as raw examples: ``image`` uint8 [side, side, C] and ``tokens`` int32 [n]."""

    images: dataset.ImageExamples
    data: ImageTextData
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = self.images.read(index, rng)
        (tokens,) = self.tokenizer.encode_batch([self._caption(index, rng)])
        return {"image": example["image"], "tokens": tokens}

    def _caption(self, index: int, rng: np.random.Generator) -> str:
        def choice(count: int) -> int:
            return int(rng.integers(count)) if self.images.training else 0

        if not self.data.captions:
            captions = self.images.images.captions(index)
            return captions[choice(len(captions))]
        chosen = self.data.captions[choice(len(self.data.captions))]
        label = int(self.images.images.labels[index])
        return chosen.of(label, choice(len(chosen.templates)))
