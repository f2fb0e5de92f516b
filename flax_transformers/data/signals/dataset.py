"""Data with one array of each of several sources in an example."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from flax_transformers.data.base import Dataset
from flax_transformers.data.sequences import PythonData, SequenceDataset
from flax_transformers.data.signals.sources import SignalSource, SignalSplit
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec
from flax_transformers.objectives.signals import SignalSpec


@dataclass(frozen=True, kw_only=True)
class SignalData(PythonData):
    """Arrays of one or several ``sources``; nothing is prepared or stored.

    Example i has array i of each source. In training, sources with fewer arrays than the longest
    start again; held-out examples are as many as the shortest has, so that none counts twice.

    Of an evaluation set (`EvaluationSet`) the held-out arrays are scored, or all of its only split,
    ``train``.
    """

    sources: tuple[SignalSource, ...]

    has_prepared_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        counted = Counter(source.name for source in self.sources)
        if not counted or max(counted.values()) > 1:
            raise UserError(
                f"data.sources are named {', '.join(map(repr, counted)) or 'nothing'}; give at "
                "least one source, and each a name of its own"
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, if one source alone has labels."""
        given = [source.label_names for source in self.sources if source.label_names]
        return given[0] if len(given) == 1 else ()

    def load(self) -> Dataset:
        train = SignalItems(self.sources, "train")
        for source, items in zip(self.sources, train.opened, strict=True):
            if not len(items):
                raise UserError(
                    f"the source {source.name!r} has no training arrays; check data.sources"
                )
        validation = SignalItems(self.sources, "validation")
        return SequenceDataset(
            train=train,
            validation=validation if len(validation) else None,
            label_names=self.label_names,
            name=_name([source.identity() for source in self.sources]),
            former_name=_name([source.former_identity() for source in self.sources]),
        )

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        if not isinstance(spec, SignalSpec):
            raise UserError(
                f"objective {objective} does not learn from a {type(self).__name__}; choose an "
                "objective such as MaskedVideo or MaskedModalities, or other data"
            )

    def dummy_example(self, spec: WindowSpec, token: int) -> dict[str, np.ndarray]:
        """Zeros of the shapes that the sources state: nothing is read."""
        found = {source.name: np.zeros(source.shape, source.dtype) for source in self.sources}
        if self.label_names:
            found["label"] = np.zeros((), np.int32)
        return found

    def of_evaluation_set(self, one: Any, label_names: tuple[str, ...] = ()) -> SignalData:
        if not isinstance(one.source, SignalSource):
            raise UserError(
                f"the source of the evaluation set {one.name!r} is a {type(one.source).__name__}; "
                "give a source of signals, as the training data has"
            )
        return _EvaluatedSignals(**vars(self) | {"sources": (one.source,), "set_name": one.name})


def _name(identities: list[dict[str, Any]]) -> str:
    return f"signals {digest({'sources': identities})}"


@dataclass(frozen=True, kw_only=True)
class _EvaluatedSignals(SignalData):
    """An evaluation set: what is scored is the training split of its dataset."""

    set_name: str

    def check_objective(self, objective: str, spec: WindowSpec) -> None:
        super().check_objective(objective, spec)
        needed, (source,) = getattr(spec, "names", ()), self.sources
        if len(needed) > 1:
            raise UserError(
                f"the evaluation set {self.set_name!r} has one source, but objective {objective} "
                f"needs {', '.join(needed)} in each example; leave the set out"
            )
        if needed and source.name not in needed:
            raise UserError(
                f"the source of the evaluation set {self.set_name!r} is named {source.name!r}, but "
                f"objective {objective} needs {needed[0]!r}; set name={needed[0]!r} of that source"
            )

    def load(self) -> Dataset:
        (source,) = self.sources
        held_out = SignalItems(self.sources, "validation")
        items = held_out if len(held_out) else SignalItems(self.sources, "train")
        if not len(items):
            raise UserError(
                f"the source {source.name!r} of an evaluation set has no arrays; check "
                "evaluation.sets"
            )
        return SequenceDataset(
            items, label_names=self.label_names, name=f"evaluation set of {source.name}"
        )


@dataclass(frozen=True)
class SignalItems:
    """One split: item i is a dict with the array of each source by its name, and ``label``."""

    sources: tuple[SignalSource, ...]
    split: Split

    @cached_property
    def opened(self) -> tuple[SignalSplit, ...]:
        return tuple(source.opened(self.split) for source in self.sources)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Label of each item, int32 [n]; None if no source, or more than one, has labels."""
        given = [items.labels for items in self.opened if items.labels is not None]
        return np.resize(given[0], len(self)) if len(given) == 1 else None

    def __len__(self) -> int:
        counts = [len(items) for items in self.opened]
        return max(counts) if self.split == "train" else min(counts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        found = {}
        for source, items in zip(self.sources, self.opened, strict=True):
            found[source.name] = items[index % len(items)]
        if self.labels is not None:
            found["label"] = np.array(self.labels[index], np.int32)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the sources themselves."""
        return {"sources": self.sources, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
