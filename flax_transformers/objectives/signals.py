"""What objectives over arrays (videos, spectrograms, point clouds ...) ask of their data, and the
names of their modalities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, WindowSpec
from flax_transformers.ranges import OutOfRange, shown


@dataclass(frozen=True)
class SignalSpec(WindowSpec):
    """One array of each source of a ``SignalData``, by its name, and the label if there is one."""

    data: ClassVar[str | None] = "SignalData"

    cross_documents: bool = False


def array_of(example: Arrays, name: str) -> np.ndarray:
    """The array ``name`` of an example. Raises UserError if the data has none."""
    if name not in example:
        raise UserError(
            f"this objective needs a source named {name!r} in data.sources; there are only "
            f"{', '.join(sorted(example.keys() - {'label'}))}"
        )
    return example[name]


def label_of(example: Arrays) -> np.ndarray:
    """The label of an example. Raises UserError unless exactly one source has labels."""
    if "label" not in example:
        raise UserError(
            "this objective needs labels, but no source or more than one source has labels; give "
            "data.sources exactly one source with labels"
        )
    return example["label"]


RESERVED = ("label", "labels", "label_weights", "weights", "mask_keys", "example_id")
"""Names that examples and batches have for other arrays."""


def check_modality(name: str, setting: str) -> None:
    """Raise OutOfRange if ``name``, the value of ``setting``, cannot be that of a modality: it is
    a key of batches and a part of the names of parameters and metrics."""
    if not name.isidentifier() or name in RESERVED:
        raise OutOfRange(
            f"{setting} is {shown(name)}; it must have only letters, digits and underscores, not "
            f"begin with a digit, and be none of {', '.join(RESERVED)}"
        )
