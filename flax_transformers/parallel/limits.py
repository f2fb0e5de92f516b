"""Time limits of the phases of a job."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from flax_transformers import ranges

PHASES = {
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
"""Descriptions of the phases; ``Limits`` has a field ``<phase>_s`` for each."""


@dataclass(frozen=True)
class Limits:
    """Time limits of the phases of a process in seconds; 0: no limit.

    When a limit is exceeded, the stack traces of all threads are printed to stderr, the process
    that the job waits for is named, and all processes exit with code 75, so that the launcher can
    restart the job. Time in which the process was suspended does not count.

    The defaults detect hangs, not slow runs: each is several times what large runs need.
    """

    start_s: float = 300.0
    """Until all processes have joined; JAX's own default."""
    prepare_s: float = 43_200.0
    """Preparing, opening and verifying the data, without progress. Training a tokenizer on a large
    corpus, or hashing a store of several TB, takes hours."""
    restore_s: float = 7_200.0
    """Initialising the state or reading a checkpoint. Several TB from a bucket take an hour."""
    first_batch_s: float = 3_600.0
    """Indexing the examples, starting the data workers, and preparing the first batch."""
    compile_s: float = 3_600.0
    """Compiling a step in all processes. Large unrolled models take tens of minutes."""
    data_s: float = 1_200.0
    """Waiting for a batch. Covers retries of remote storage; less than ``step_s``, so that the
    process with slow data is the first to report."""
    step_s: float = 1_800.0
    """One step, with everything between two batches that has no phase of its own. Steps of the
    largest models with many micro-batches take one or two minutes."""
    evaluation_s: float = 3_600.0
    """Between two batches of an evaluation, or one evaluator that generates text."""
    save_s: float = 7_200.0
    """Writing a checkpoint, after the previous one is finished."""
    exit_s: float = 1_800.0
    """Ending, while process 0 writes plots and samples."""
    grace_s: float = 120.0
    """After SIGTERM or Ctrl-C, without progress. Usually a run finishes its step, saves, and exits
    with code 42. Schedulers kill after 30 s to 10 minutes."""

    RANGES: ClassVar[ranges.Ranges] = {f"{name}_s": ranges.SECONDS for name in (*PHASES, "grace")}

    def __post_init__(self) -> None:
        ranges.check_fields(self, "limits")

    def of(self, phase: str) -> float:
        """The limit of a phase."""
        limit: float = getattr(self, f"{phase}_s")
        return limit


assert {field.name for field in fields(Limits)} == set(Limits.RANGES)
