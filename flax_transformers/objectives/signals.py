"""What objectives over arrays (videos, spectrograms, point clouds ...) ask of their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Arrays, WindowSpec


@dataclass(frozen=True)
class SignalSpec(WindowSpec):
    """One array of each source of a ``SignalData``, by its name, and the label if there is one.

    ``names``: of the sources that the objective needs.
    """

    data: ClassVar[str | None] = "SignalData"

    cross_documents: bool = False
    names: tuple[str, ...] = ()


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
