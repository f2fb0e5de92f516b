"""The typed description of a run, and what may change when a run is resumed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from flax_transformers import ranges
from flax_transformers.adapters.lora import LoraConfig
from flax_transformers.checkpointing.config import CheckpointConfig, EarlyStopping
from flax_transformers.checkpointing.metric_mode import Mode
from flax_transformers.config_json import FORMAT, from_json, to_json
from flax_transformers.data.base import DataConfig, EvaluationSet
from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig, TransformerConfig
from flax_transformers.monitoring.sinks import SinkConfig
from flax_transformers.objectives.base import Objective
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import OptimizerFactory
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.mesh import MeshConfig

_PHASE_RANGES: ranges.Ranges = {
    "steps": ranges.integers(),
    "sequence_length": ranges.POSITIONS,
    "image_size": ranges.PIXELS,
    "batch_size": ranges.EXAMPLES,
    "micro_batches": ranges.EXAMPLES,
}


@dataclass(frozen=True)
class Phase:
    """A phase of training with one sequence length and one batch size."""

    steps: int
    sequence_length: int
    """Tokens in a sequence, special tokens included."""
    batch_size: int
    """Examples in a step, over all devices and processes."""
    micro_batches: int = 1
    """Number of gradient-accumulation steps; the gradient is that of the whole batch."""

    RANGES: ClassVar[ranges.Ranges] = _PHASE_RANGES

    def __post_init__(self) -> None:
        ranges.check_fields(self, "phases")

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sequences and tokens."""
        return self.batch_size, self.sequence_length


@dataclass(frozen=True, kw_only=True)
class ImagePhase:
    """A phase of training on square images of one size."""

    steps: int
    image_size: int
    """Pixels of a side. If it differs from the model's, the positions are interpolated."""
    batch_size: int
    """Images in a step, over all devices and processes."""
    micro_batches: int = 1
    """As in ``Phase``."""

    RANGES: ClassVar[ranges.Ranges] = _PHASE_RANGES

    def __post_init__(self) -> None:
        ranges.check_fields(self, "phases")

    @property
    def sequence_length(self) -> int:
        """The size of an example that objectives are given: the side of its image."""
        return self.image_size

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Images, and their height and width."""
        return self.batch_size, self.image_size, self.image_size


AnyPhase = Phase | ImagePhase


@dataclass(frozen=True)
class Evaluation:
    """How often, and on how much, the held-out data are scored."""

    every_steps: int = 1000
    """0: only at the end."""
    batch_size: int = 64
    max_examples: int | None = None
    """Score so many held-out examples, evenly spread over all of them; None: all."""
    sets: tuple[EvaluationSet, ...] = ()
    """Further data to score at each evaluation, as ``eval/NAME/...``. None of it is trained on."""
    probes: tuple[Literal["knn", "linear"], ...] = ()
    """Classifiers of the frozen features of images, fitted at each evaluation."""

    RANGES: ClassVar[ranges.Ranges] = {
        "every_steps": ranges.integers(0),
        "batch_size": ranges.EXAMPLES,
        "max_examples": ranges.integers(),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "evaluation")
        names = [one.name for one in self.sets]
        for name in names:
            if names.count(name) > 1:
                raise ranges.OutOfRange(f"evaluation.sets has {name!r} twice; give other names")


@dataclass(frozen=True)
class Logging:
    """What a run writes while it trains."""

    every_steps: int = 10
    tensorboard: bool = True
    sinks: tuple[SinkConfig, ...] = ()
    """Further sinks for metrics, beside metrics.jsonl, the console and TensorBoard: dataclasses of
    the user's own (see ``monitoring.sinks.SinkConfig``)."""
    module_norms: bool = False
    """Also write the norms of gradients and parameters of each module, with all layers of a stack
    together: ``optimizer/grad_norm/PATH`` and ``optimizer/param_norm/PATH``."""
    example_log: bool = False
    """Append the ids of the examples of each step to ``ledger-<process>.jsonl``, to check that a
    restarted run repeats and skips none."""
    hang_dump_s: float = 600.0
    """If a step, or the wait for a batch, takes more seconds than this, print the stacks of all
    threads on stderr; 0: never. The run continues; ``limits`` says when it ends."""

    RANGES: ClassVar[ranges.Ranges] = {
        "every_steps": ranges.integers(),
        "hang_dump_s": ranges.SECONDS,
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "logging")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run."""

    model: TransformerConfig
    objective: Objective
    data: DataConfig
    optimizer: OptimizerFactory
    phases: tuple[AnyPhase, ...]
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(dtype="auto"))
    ema: EMAConfig = field(default_factory=EMAConfig)
    """If an average of the weights is kept, ``eval/...`` metrics and loaded models use it."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """With a rank, low-rank adapters are trained instead of the kernels."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: Evaluation = field(default_factory=Evaluation)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    logging: Logging = field(default_factory=Logging)
    limits: Limits = field(default_factory=Limits)
    """How long start, data, step, save and exit may take before the job ends with code 75."""
    max_consecutive_skips: int = 20
    """Consecutive steps that may be skipped for gradients that are not finite, or a spike."""
    skip_spikes_above: float | None = None
    """Skip a step whose gradient norm is more than this many times its mean over about 100 steps;
    the run continues with the next batch. None: skip none."""
    max_rollbacks: int = 0
    """How often a run may roll back to its newest checkpoint and leave out the data since, when
    more than ``max_consecutive_skips`` consecutive steps are skipped. After that it ends."""
    init_from: str | None = None
    """A checkpoint, or a directory in Hugging Face format, whose weights a new run starts from.
    Heads that it does not have are newly initialized."""
    seed: int = 0
    platform: str | None = None
    """"cpu", "gpu" or "tpu": fail if it is not available. None: use what is available."""

    RANGES: ClassVar[ranges.Ranges] = {
        "max_consecutive_skips": ranges.integers(0),
        "skip_spikes_above": ranges.numbers(1, 1e9, above=True),
        "max_rollbacks": ranges.integers(0),
        "seed": ranges.integers(0, 2**32 - 1),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "")
        if not self.phases:
            raise ranges.OutOfRange("phases is empty; give at least one Phase(steps=..., ...)")
        longest = max(phase.sequence_length for phase in self.phases)
        limit = self.model.length_limit
        if limit is not None and longest > limit:
            raise ranges.OutOfRange(
                f"a phase has sequence_length {longest}, but model.max_positions allows "
                f"{limit}; shorten the phase or raise max_positions"
            )

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def retention(self) -> CheckpointConfig:
        """``checkpoints``; if the run may stop early and they keep no best step, with one, by the
        metric of early stopping."""
        if self.early_stopping.patience is None or self.checkpoints.keep_best:
            return self.checkpoints
        metric, mode = self.stopping_metric
        return replace(self.checkpoints, keep_best=1, best_metric=metric, best_mode=mode)

    @property
    def stopping_metric(self) -> tuple[str, Mode]:
        """Metric and mode of early stopping."""
        own = self.early_stopping
        if own.metric is not None and own.mode is not None:
            return own.metric, own.mode
        return self.checkpoints.best_metric, self.checkpoints.mode


_DEFINES_RUN = ("model", "objective", "data", "lora", "seed")
"""What identifies a run. All else (rates, mesh, logging ...) may change when it is resumed."""

_FREE_WITHIN = re.compile(
    r"""model\.(generation|hub_fields)(\..*)? | data\.( store | prepare_processes | workers | verify
    # Checked by the fingerprints of the training examples and the tokenizers, wherever they are:
    | ((components\.\d+\.)?source|sources\.\d+)\.(\w+_)?path
    | (target_)?tokenizer(\..*)?
    # Not trained on:
    | (components\.\d+\.)?validation_source(\..*)?
    | zero_shot(_data)?(\..*)? )""",
    re.VERBOSE,
)


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two JSON configs differ, as ``{"model.hidden_size": (128, 256)}``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = {}
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found |= differences(a, b, f"{path}.{i}")
        return found
    return {} if old == new else {path: (old, new)}


def check_resumable(
    saved: Any,
    config: TrainConfig,
    where: str,
    defining: Sequence[str] = _DEFINES_RUN,
    free: re.Pattern[str] = _FREE_WITHIN,
) -> list[str]:
    """Compares the config of a checkpoint with the current one.

    Raises UserError if they describe different runs, that is, differ in one of the ``defining``
    fields, but for the fields within them that ``free`` matches; otherwise returns a line for each
    field that changed.
    """
    try:
        saved = to_json(from_json(saved))  # fields that are new since have their defaults
    except UserError:
        # Names of types differ between formats: such a config cannot be compared as it is.
        if not isinstance(saved, dict) or saved.get("format", 1) != FORMAT:
            raise
    changed = differences(saved, to_json(config))
    shown = {field: f"{field} {old!r} -> {new!r}" for field, (old, new) in changed.items()}
    other_run = [
        text
        for field, text in shown.items()
        if field.split(".")[0] in defining and not free.fullmatch(field)
    ]
    if other_run:
        raise UserError(
            f"{where} belongs to another run ({'; '.join(other_run[:3])}"
            f"{' ...' if len(other_run) > 3 else ''}); nothing was changed: choose another "
            "--workdir, or the config it was started with"
        )
    return list(shown.values())
