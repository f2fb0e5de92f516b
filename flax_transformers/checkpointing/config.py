"""Settings of checkpoints, and of stopping before the last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.checkpointing.metric_mode import Mode, mode_of


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them are kept."""

    every_steps: int = 1000
    """0: only at the end."""
    keep_latest: int = 3
    keep_every: int | None = None
    """Keep every step that is a multiple of this, for good."""
    keep_best: int = 0
    """Keep this many with the best ``best_metric``, besides the latest, and save after every
    evaluation that is the best so far; 0: neither. See ``find_checkpoint`` for the name "best"."""
    best_metric: str = "eval/loss"
    best_mode: Mode | None = None
    """Whether lower or higher is better; None: known from the metric's name."""
    asynchronous: bool = True
    """Write in the background while training continues."""
    export_every: int | None = None
    """Write the model in Hugging Face format to exports/STEP of the workdir every so many steps and
    at the end; None: never."""
    keep_exports: int = 2
    """Number of exports that are kept, the newest."""
    invalid_to_keep: int = 8
    """Maximum number of damaged steps that are set aside; one more ends the run with an error."""

    RANGES: ClassVar[ranges.Ranges] = {
        "every_steps": ranges.integers(0),
        "keep_latest": ranges.integers(),
        "keep_every": ranges.integers(),
        "keep_best": ranges.integers(0),
        "export_every": ranges.integers(),
        "keep_exports": ranges.integers(),
        "invalid_to_keep": ranges.integers(0),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "checkpoints")
        if self.best_mode is None and mode_of(self.best_metric) is None:
            raise ranges.OutOfRange(
                f"checkpoints.best_metric is {ranges.shown(self.best_metric)}, whose name does not "
                "say whether lower or higher is better; set checkpoints.best_mode to min or max"
            )

    @property
    def mode(self) -> Mode:
        """``best_mode``, or that of the metric's name."""
        return self.best_mode or mode_of(self.best_metric) or "min"


@dataclass(frozen=True)
class EarlyStopping:
    """Whether a run ends before its last step because an evaluation metric has stopped improving.

    The best step by its metric is kept then, unless ``checkpoints.keep_best`` keeps some by theirs.
    """

    patience: int | None = None
    """End after this many consecutive evaluations without an improvement; None: never."""
    min_delta: float = 0.0
    """An improvement is a change of the metric by more than this."""
    metric: str | None = None
    """Such as "eval/accuracy", together with ``mode``; None: ``checkpoints.best_metric``."""
    mode: Mode | None = None
    """Whether lower or higher is better."""

    RANGES: ClassVar[ranges.Ranges] = {
        "patience": ranges.integers(),
        "min_delta": ranges.numbers(0, 1e9),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "early_stopping")
        if (self.metric is None) != (self.mode is None):
            raise ranges.OutOfRange(
                f"early_stopping.metric is {ranges.shown(self.metric)} and early_stopping.mode "
                f"is {self.mode!r}; give both, or neither to use those of checkpoints"
            )
