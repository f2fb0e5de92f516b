"""Time limits of the phases of a job."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.ranges import Ranges

DOING = {
    "start": "joining the other processes",
    "prepare": "preparing and opening the data",
    "restore": "initialising the state or reading a checkpoint",
    "first_batch": "waiting for the first batch",
    "compile": "compiling",
    "data": "waiting for the next batch",
    "step": "running training steps",
    "evaluation": "evaluating",
    "save": "writing a checkpoint",
    "exit": "ending",
}
"""What a process does in each phase; ``Limits`` has a field ``<phase>_s`` for each."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a process may spend in a phase; 0: any time.

    After that the stacks of all threads go to stderr, the process that the job waits for is named,
    and all processes exit with code 75, so that the launcher can start the job again. Time in which
    the process itself was suspended does not count.

    The defaults are for hangs, not for slowness: each is several times what large healthy runs
    need.
    """

    start_s: float = 300.0
    """Until all processes have joined. Nodes start minutes apart; this is JAX's own default."""
    prepare_s: float = 43_200.0
    """To prepare, open and verify the data, without a document done. Training a tokenizer on a
    large corpus, or hashing a store of some TB, takes hours."""
    restore_s: float = 7_200.0
    """To initialise the state, or to read a checkpoint: some TB from a bucket take an hour."""
    first_batch_s: float = 3_600.0
    """To index the examples, start the data workers, and make one batch."""
    compile_s: float = 3_600.0
    """To compile a step in all processes. Large unrolled models take tens of minutes."""
    data_s: float = 1_200.0
    """For one batch. Covers retries against remote storage; less than ``step_s``, so that the
    process with slow data is the first to speak."""
    step_s: float = 1_800.0
    """For one step, with everything between two batches that is not named here. Steps of the
    largest models with many micro-batches take a minute or two."""
    evaluation_s: float = 3_600.0
    """Between two batches of an evaluation, or for an evaluator that generates text."""
    save_s: float = 7_200.0
    """To write a checkpoint, which includes waiting for the one before it."""
    exit_s: float = 1_800.0
    """To end once all is done; the others wait here while process 0 draws plots and samples."""
    grace_s: float = 120.0
    """After SIGTERM or Ctrl-C without any progress. A healthy run reaches its next step, saves, and
    exits with code 42; schedulers kill after 30 s to 10 minutes anyway."""

    RANGES: ClassVar[Ranges] = {f"{name}_s": ranges.SECONDS for name in (*DOING, "grace")}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "limits")

    def of(self, phase: str) -> float:
        """The limit of a phase of ``DOING``."""
        limit: float = getattr(self, f"{phase}_s")
        return limit


assert {field.name for field in fields(Limits)} == set(Limits.RANGES)
