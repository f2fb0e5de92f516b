"""Sources of arrays: NumPy files, images of digits, and the bytes of the embedded text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.sources import open_images
from flax_transformers.data.signals.names import check_modality
from flax_transformers.data.sources import embedded
from flax_transformers.data.sources.files import reading_source
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import content_digest

DIGITS = tuple(map(str, range(10)))
Dtype = Literal[
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
]


@dataclass(frozen=True)
class SignalSplit:
    """One split of a source: ``read(i)`` gives array i. ``labels`` int32 [count], or None."""

    count: int
    read: Callable[[int], np.ndarray]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(index)


@dataclass(frozen=True, kw_only=True)
class SignalSource:
    """Base of the sources. Creating one reads nothing."""

    name: str
    """Name of the modality, as the objective or the model knows it."""

    RANGES: ClassVar[ranges.Ranges] = {}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.sources")
        check_modality(self.name, "data.sources.name")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one array."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """Dtype of the arrays."""
        return "uint8"

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes; empty without labels."""
        return ()

    def opened(self, split: Split) -> SignalSplit:
        """The arrays of a split. Raises UserError for missing files."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What identifies the training data: the settings, without paths, and the content."""
        settings = dataclasses.asdict(self)
        settings.pop("path", None)
        return {"kind": type(self).__name__, **settings}

    def former_identity(self) -> dict[str, Any]:
        """The identity of the same data in earlier versions."""
        return self.identity()


def digest_of_ends(arrays: np.ndarray) -> str:
    """Hash of the number of arrays, the first, and the last."""
    ends = [arrays[i].tobytes().hex() for i in (0, -1)] if len(arrays) else []
    return digest({"count": len(arrays), "ends": ends})


@dataclass(frozen=True, kw_only=True)
class ArraySource(SignalSource):
    """Arrays in NumPy files: ``path``/train.npy [n, ...] and, for evaluation, validation.npy.

    Videos are frames uint8 [n, F, H, W, C], already decoded; spectrograms and depth maps float32
    [n, H, W, 1]; point clouds float32 [n, points, 3]; bytes uint8 [n, length]. The files are mapped
    into memory; train.npy is read as a whole only once after it has changed, as a run resumes only
    with the same content. Labels are in train_labels.npy and validation_labels.npy, integers [n],
    if ``classes`` are given.
    """

    path: str
    array_shape: tuple[int, ...]
    """Shape of one array, without the axis of examples."""
    array_dtype: Dtype = "uint8"
    classes: tuple[str, ...] = ()
    """Names of the classes; empty: there are no labels."""

    RANGES: ClassVar[ranges.Ranges] = {"array_shape": ranges.integers()}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array_shape

    @property
    def dtype(self) -> str:
        return self.array_dtype

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.classes

    def identity(self) -> dict[str, Any]:
        return self._identity(content_digest([("train.npy", self._file("train"))]))

    def former_identity(self) -> dict[str, Any]:
        return self._identity(digest_of_ends(_mapped(self._file("train"))))

    def _file(self, name: str) -> Path:
        return Path(self.path).expanduser() / f"{name}.npy"

    def _identity(self, content: str) -> dict[str, Any]:
        found = super().identity() | {"content": content}
        if self.classes:
            labels = np.ascontiguousarray(_mapped(self._file("train_labels")))
            found["labels"] = hashlib.sha256(labels.tobytes()).hexdigest()
        return found

    def opened(self, split: Split) -> SignalSplit:
        path = self._file(split)
        with reading_source(path):
            exists = path.exists()
        if split == "validation" and not exists:
            return SignalSplit(0, lambda index: np.zeros(self.shape, self.dtype))
        arrays = _mapped(path)
        if arrays.shape[1:] != self.shape or arrays.dtype != np.dtype(self.dtype):
            raise UserError(
                f"{path} holds arrays of shape {list(arrays.shape[1:])} and dtype {arrays.dtype}, "
                f"but the source {self.name!r} says {list(self.shape)} and {self.dtype}"
            )
        if not self.classes:
            return SignalSplit(len(arrays), lambda index: np.array(arrays[index]))
        file = path.with_name(f"{split}_labels.npy")
        labels = np.asarray(_mapped(file))
        if labels.shape != (len(arrays),) or not np.isin(labels, range(len(self.classes))).all():
            raise UserError(
                f"{file} must hold one integer from 0 to {len(self.classes) - 1} for each of the "
                f"{len(arrays)} arrays of {path}"
            )
        return SignalSplit(
            len(arrays), lambda index: np.array(arrays[index]), labels.astype(np.int32)
        )


def _mapped(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; check data.sources.") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is no NumPy file of an array: {error}") from None
    if not isinstance(found, np.ndarray) or not found.ndim:
        raise UserError(f"{path} is no NumPy file of an array with an axis of examples")
    return found


@dataclass(frozen=True, kw_only=True)
class Digits(SignalSource):
    """Handwritten digits uint8 [28, 28, 1] with labels, from a folder of MNIST's files."""

    path: str = "data/mnist"

    shape: ClassVar[tuple[int, ...]] = (28, 28, 1)
    label_names: ClassVar[tuple[str, ...]] = DIGITS

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"content": digest_of_ends(digits(self.path, "train")[0])}

    def opened(self, split: Split) -> SignalSplit:
        images, labels = digits(self.path, split)
        return SignalSplit(len(images), lambda index: images[index][..., None], labels)


@lru_cache(maxsize=4)
def digits(path: str, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28] and labels int32 [n] of MNIST's files."""
    opened = open_images(ImageSource(path, "train" if split == "train" else "test"))
    if opened.shape != (28, 28):
        raise UserError(f"{path} holds other images than MNIST's; check data.sources.")
    found = list(opened.read(0, len(opened)))
    pixels = np.frombuffer(b"".join(one.raw for one in found), np.uint8)
    return pixels.reshape(-1, 28, 28), np.array([one.label for one in found], np.int32)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBytes(SignalSource):
    """Windows of the text that comes with Python as bytes, uint8 [length]; see ``embedded``.

    One in twenty documents is held out.
    """

    length: int = 64

    RANGES: ClassVar[ranges.Ranges] = {"length": ranges.integers(1, 1 << 20)}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    def opened(self, split: Split) -> SignalSplit:
        text = _embedded_bytes(split)
        count = len(text) // self.length

        def read(index: int) -> np.ndarray:
            return text[index * self.length : (index + 1) * self.length]

        return SignalSplit(count, read)


@lru_cache(maxsize=2)
def _embedded_bytes(split: Split) -> np.ndarray:
    chosen = [
        document
        for number, document in enumerate(embedded.documents())
        if (number % 20 == 19) == (split == "validation")
    ]
    return np.frombuffer("\n\n".join(chosen).encode(), np.uint8)
