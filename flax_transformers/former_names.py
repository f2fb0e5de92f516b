"""Names of version 0.1 that config files and programs may still use, for one release.

A module that moved is found under its former name, with what it held; importing it warns once.
Former names of dataclass fields are accepted as arguments where `accepts_former_fields` says so.
Saved configs need none of this: they name types by ids (see ``config_json``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_PACKAGE = __package__

MODULES = {
    "data.augmentation": "data.images.augmentation",
    "data.conllu": "data.sources.conllu",
    "data.gates": "data.prepare.filters",
    "data.image_kinds": "data.images.kinds",
    "data.labelled": "data.sources.labelled",
    "data.pairs": "data.sources.pairs",
    "data.squad": "data.sources.squad",
    "data.text": "data.sources.text",
    "families.family": "huggingface.family",
    "models.distance_bias": "models.kernels.relative_position_bias",
    "models.positions": "models.layers.positions",
    "objectives.contract": "objectives.base",
    "objectives.word_loss": "objectives.lm_loss",
    "training.average": "optim.ema",
    "training.checkpoints": "checkpointing.manager",
    "training.config_json": "config_json",
    "training.metrics": "monitoring.metrics",
    "training.optimizers": "optim.optimizers",
    "training.restore": "restore",
    "training.schedules": "optim.schedules",
}
"""Where the content of a former module is today."""

PACKAGES = {
    "data.images": "data.images.dataset",
    "data.prepare": "data.prepare.text",
    "data.sources": "data.sources.read",
    "data.store": "data.store.token_store",
    "data.tokenizers": "data.tokenizers.load",
}
"""Packages that were modules: where what they held is today."""

ATTRIBUTES = {
    "DistanceBias": "RelativePositionBias",
    "Execution": "ComputeConfig",
    "Gates": "Filters",
    "Shown": "ExampleView",
    "Terms": "LossTerms",
    "WeightAverage": "EMAConfig",
    "WordLoss": "LMLoss",
    "open_prepared": "data.dataset.open_dataset",
    "prepare_images": "data.dataset.prepare",
    "prepare_text": "data.dataset.prepare",
}
"""Classes and functions that have another name now; with dots, also another module."""

KindT = TypeVar("KindT", bound=type)


def install() -> None:
    """Lets ``import`` find former modules."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def former_attribute(module: str, name: str) -> Any:
    """The ``__getattr__`` of a module or package that once held ``name``. Raises AttributeError."""
    inner = module.removeprefix(f"{_PACKAGE}.")
    place = PACKAGES.get(inner, inner)
    is_module = inner in PACKAGES and importlib.util.find_spec(f"{module}.{name}") is not None
    if not is_module and not name.startswith("__"):  # a module is imported by who asks
        current = ATTRIBUTES.get(name, name)
        if "." in current:
            place, _, current = current.rpartition(".")
        found = vars(importlib.import_module(f"{_PACKAGE}.{place}")).get(current)
        if found is not None:
            _warn(f"{module}.{name}", f"{_PACKAGE}.{place}.{current}")
            return found
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def accepts_former_fields(**names: str) -> Callable[[KindT], KindT]:
    """A class decorator: arguments by the former name of a field, with a warning.

    ``names`` maps former names to those of today.
    """

    def decorated(kind: KindT) -> KindT:
        original = kind.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def initialize(self: Any, *args: Any, **fields: Any) -> None:
            for former, current in names.items():
                if former in fields:
                    _warn(f"the field {former} of {kind.__name__}", current)
                    fields[current] = fields.pop(former)
            original(self, *args, **fields)

        kind.__init__ = initialize  # type: ignore[misc]
        return kind

    return decorated


def _warn(former: str, current: str) -> None:
    warnings.warn(
        f"{former} is called {current} now; the former name will be removed in version 0.3",
        FutureWarning,
        stacklevel=3,
    )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a module of a former name that gives what the module of today has."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix(f"{_PACKAGE}.") not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        current = f"{_PACKAGE}.{MODULES[spec.name.removeprefix(f'{_PACKAGE}.')]}"
        _warn(spec.name, current)
        return _Former(spec.name, importlib.import_module(current))

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Former(types.ModuleType):
    def __init__(self, name: str, current: types.ModuleType) -> None:
        super().__init__(name, current.__doc__)
        self._current = current

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, ATTRIBUTES.get(name, name))
