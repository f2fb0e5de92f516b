"""Studies: variants of a config times a grid times seeds, and the runs that they consist of."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from etils import epath

from flax_transformers import ranges
from flax_transformers.checkpointing.metric_mode import mode_of
from flax_transformers.config_json import FORMER_FIELDS, register_types_of, to_json
from flax_transformers.errors import UserError
from flax_transformers.training.config import TrainConfig

Variant = Mapping[str, Any] | Callable[[TrainConfig], TrainConfig]
"""Config fields and their values, ``{"model.activation": "relu"}``, or a function of the base."""
FineTune = Callable[[TrainConfig, str], TrainConfig]
"""Config of a second training, from the config and the workdir of the first, which is still empty
then. An ``init_from`` that it sets, such as a step in that workdir, stays."""
Override = Callable[[TrainConfig, Sequence[str]], TrainConfig]
"""Sets fields of a config from the tokens of a command line, as `cli.parsing.override` does."""

_NAME = re.compile(r"[\w.+=-]+")
_VALUE_LENGTH = 40
_FOR_FUNCTIONS = re.compile(
    r"(checkpoints\.(?!best_)|limits\.|logging\.|mesh\.)\w+|evaluation\.batch_size|platform"
)
"""What options also set in the configs that functions return: how a run is carried out."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment: what is varied, how often it is repeated, and what is expected.

    A study file has a function ``get_study()`` that returns one.
    """

    base: TrainConfig
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"": {}})
    """What is compared, by name. The fields of a variant are set in ``base``."""
    seeds: int = 1
    """Number of runs of each variant, with the seeds ``base.seed``, ``base.seed + 1`` ..."""
    metric: str = "eval/loss"
    """A metric of the last evaluation; with early stopping, of the best one."""
    maximize: bool | None = None
    """Whether higher values of the metric are better. None: known from its name."""
    baseline: str | None = None
    """The variant that all others are compared with. None: the first."""
    fine_tune: FineTune | Mapping[str, FineTune] | None = None
    """Makes the config of a second training, which starts from the weights of the first and has the
    same seed; the metric is then its own. A mapping: by variant; others are trained once."""
    published: str = ""
    """The published effect."""
    citation: str = ""
    expected: tuple[tuple[str, str], ...] = ()
    """Pairs of variants (better, worse): the direction of the published effect."""

    def __post_init__(self) -> None:
        ranges.check_number("seeds of the study", self.seeds, ranges.integers(1, 10_000))
        if not self.variants:
            raise UserError("variants of the study is empty; give at least one")
        for name in self.variants:
            if name and not _NAME.fullmatch(name):
                raise UserError(
                    f"a variant of the study is called {name!r}; folders have its name: use "
                    "letters, digits and _ . + = -"
                )
        second = self.fine_tune if isinstance(self.fine_tune, Mapping) else {}
        for named in (*itertools.chain(*self.expected), self.baseline, *second):
            if named is not None and named not in self.variants:
                known = ", ".join(self.variants)
                raise UserError(f"the study has no variant {named!r}; its variants are {known}")

    def fine_tune_of(self, variant: str) -> FineTune | None:
        """What makes the config of the second training of a variant; None if it is trained once."""
        if isinstance(self.fine_tune, Mapping):
            return self.fine_tune.get(variant)
        return self.fine_tune

    @property
    def higher_is_better(self) -> bool:
        """The direction of the metric. Raises UserError if it is unknown."""
        if self.maximize is not None:
            return self.maximize
        mode = mode_of(self.metric)
        if mode is None:
            raise UserError(
                f"it is not known whether more of --metric {self.metric} is better; add --maximize "
                "or --minimize"
            )
        return mode == "max"


@dataclass(frozen=True)
class Point:
    """A variant with one value of each field of the grid."""

    name: str
    variant: str
    settings: Mapping[str, str]
    """The values of the grid by field, as given."""
    config: TrainConfig
    overrides: tuple[str, ...] = ()
    """The fields that are set, as tokens of a command line."""


@dataclass(frozen=True)
class Training:
    """A config and the workdir it is trained in."""

    config: TrainConfig
    workdir: epath.Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyRun:
    """A point with a seed: one training, or two of which the second continues from the first."""

    name: str
    point: Point
    seed: int
    trainings: tuple[Training, ...]


@dataclass(frozen=True)
class StudyRuns:
    """All runs of a study, below one folder."""

    study: Study
    points: tuple[Point, ...]
    baseline: Point
    """The point that all others are compared with."""
    folder: epath.Path
    overrides: tuple[str, ...] = ()
    """The fields that were set in ``study.base``, as tokens of a command line."""

    @property
    def runs(self) -> list[StudyRun]:
        """One seed of every point before the next seed, so that all can be compared early."""
        seeds = range(self.study.base.seed, self.study.base.seed + self.study.seeds)
        return [self._run(point, seed) for seed in seeds for point in self.points]

    def _run(self, point: Point, seed: int) -> StudyRun:
        name = ",".join(filter(None, [point.name, f"seed={seed}"]))
        first = Training(replace(point.config, seed=seed), self.folder / name, point.overrides)
        trainings = [first]
        fine_tune = self.study.fine_tune_of(point.variant)
        if fine_tune is not None:
            start = str(first.workdir)
            second = _returned(fine_tune, "fine_tune", first.config, start)
            second = _with_fields(second, first.config, option_fields(self.overrides))
            unchanged = second.init_from in (None, first.config.init_from)
            second = replace(second, init_from=start if unchanged else second.init_from, seed=seed)
            trainings.append(Training(second, self.folder / f"{name},fine_tuned"))
        return StudyRun(name, point, seed, tuple(trainings))


def grid_axes(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Values by field, from texts such as "optimizer.learning_rate=2e-5,3e-5".

    Raises UserError for a text of another form, and for a field or a value that is given twice.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name, chosen = name.strip().replace("-", "_"), tuple(map(str.strip, values.split(",")))
        if not (name and equals and all(chosen)):
            raise UserError(
                f"--grid {text} is not a field and its values, as in "
                "optimizer.learning_rate=2e-5,3e-5"
            )
        if name == "seed":
            raise UserError("--grid seed is not possible; give the number of seeds with --seeds")
        if name in axes or len(set(chosen)) < len(chosen):
            raise UserError(f"--grid {text} repeats a field or a value; give each once")
        axes[name] = chosen
    return axes


def points(
    study: Study,
    axes: Mapping[str, Sequence[str]],
    override: Override,
    overrides: Sequence[str] = (),
) -> list[Point]:
    """Every variant with every combination of the values in ``axes``.

    ``overrides``: the fields that were set in ``study.base``.

    Raises UserError, which names the point, for an unknown field and for a value that the config
    refuses; and for two points with equal configs.
    """
    last = [name.rpartition(".")[2] for name in axes]
    labels = {
        name: short if last.count(short) == 1 else name
        for name, short in zip(axes, last, strict=True)
    }
    found: list[Point] = []
    for variant, values in itertools.product(study.variants, itertools.product(*axes.values())):
        settings = dict(zip(axes, values, strict=True))
        parts = [f"{labels[name]}={_readable(value)}" for name, value in settings.items()]
        name = ",".join(filter(None, [variant, *parts]))
        tokens = [token for one, text in settings.items() for token in _tokens(one, text.split())]
        try:
            config, own = _applied(study.variants[variant], study.base, option_fields(overrides))
            config = override(config, [*own, *tokens])
        except UserError as error:
            raise UserError(f"grid point {name}: {error}") from error
        found.append(Point(name, variant, settings, config, (*overrides, *own, *tokens)))
    _refuse_equal(study, found)
    return found


def baseline_of(study: Study, points: Sequence[Point], name: str | None) -> Point:
    """The point called ``name``; without it, the first of the study's baseline.

    Raises UserError if there is no such point.
    """
    variant = study.baseline or next(iter(study.variants))
    for point in points:
        if point.name == name or (name is None and point.variant == variant):
            return point
    known = ", ".join(point.name for point in points)
    raise UserError(f"there is no grid point {name}; --baseline is one of {known}")


def _refuse_equal(study: Study, found: Sequence[Point]) -> None:
    known: dict[Any, str] = {}
    for point in found:
        trained = repr(to_json(point.config)), study.fine_tune_of(point.variant)
        other = known.setdefault(trained, point.name)
        if other != point.name:
            raise UserError(
                f"the grid points {other} and {point.name} have the same config; leave one out"
            )


def _applied(
    variant: Variant, base: TrainConfig, given: Sequence[str]
) -> tuple[TrainConfig, list[str]]:
    """The config that a function makes of ``base``, in which the ``given`` fields are set; or
    ``base``, and the tokens to set fields."""
    if not callable(variant):
        return base, [token for one in variant.items() for token in _tokens(*one)]
    return _with_fields(_returned(variant, "a variant", base), base, given), []


def option_fields(overrides: Sequence[str]) -> list[str]:
    """The fields that tokens of a command line set, such as "optimizer.learning_rate"."""
    options = [token[2:].partition("=")[0] for token in overrides if token.startswith("--")]
    paths = [option.replace("-", "_").split(".") for option in options]
    return [".".join(FORMER_FIELDS.get(name, name) for name in path) for path in paths]


def value_of(config: Any, field: str) -> Any:
    """The value of "optimizer.learning_rate" or "phases.0.steps"; None if there is none."""
    for name in field.split("."):
        if isinstance(config, tuple) and name.isdecimal():
            config = config[int(name)] if int(name) < len(config) else None
        else:
            config = getattr(config, name, None)
    return config


def _with_fields(config: TrainConfig, source: TrainConfig, given: Sequence[str]) -> TrainConfig:
    """``config`` with the ``given`` fields of ``source`` that say how a run is carried out."""
    changes: dict[str, dict[str, Any]] = {"": {}}
    for name in filter(_FOR_FUNCTIONS.fullmatch, given):
        section, _, one = name.rpartition(".")
        if hasattr(getattr(config, section, config), one):
            changes.setdefault(section, {})[one] = value_of(source, name)
    own = changes.pop("")
    sections = {name: replace(getattr(config, name), **some) for name, some in changes.items()}
    return replace(config, **own, **sections)


def _returned(function: Callable[..., TrainConfig], name: str, *arguments: Any) -> TrainConfig:
    """What a function of the study file returns. Raises UserError if it fails."""
    try:
        config = function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} of the study fails with {type(error).__name__}: {error}; correct the file"
        ) from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"{name} of the study must return a TrainConfig, not {type(config)}")
    register_types_of(config)
    return config


def _tokens(name: str, value: Any) -> list[str]:
    """The tokens that set a field."""
    values = value if isinstance(value, tuple | list) else [value]
    if len(values) == 1:
        return [f"--{name}={values[0]}"]  # with "=", also a negative number such as -1e-3
    return [f"--{name}", *map(str, values)]


def _readable(value: str) -> str:
    """``value`` as a part of a folder's name; a hash tells apart what is changed or cut."""
    plain = re.sub(r"[^\w.+=-]+", "-", value)
    if plain == value and len(value) <= _VALUE_LENGTH:
        return value
    return f"{plain[:_VALUE_LENGTH]}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
