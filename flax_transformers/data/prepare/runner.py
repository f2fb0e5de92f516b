"""Prepares a store of any kind: in one process, or in several jobs that share the folder.

The work is divided into units (shards of text, parts of a collection of images). Each unit ends
with a record that names what it was made from, and is skipped when its record is found, so a killed
run resumes with the units that are missing. The manifest is written last; a folder with a manifest
is a finished store. The content of a store depends neither on the number of processes and jobs nor
on interruptions.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from flax_transformers.data.base import Compare, Dataset
from flax_transformers.data.prepare.origin import Origin, claim
from flax_transformers.data.prepare.workers import require_job
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import Folder
from flax_transformers.storage.locks import exclusive_lock, shared_lock

DatasetT = TypeVar("DatasetT", bound=Dataset)
JobT = TypeVar("JobT")


@dataclass(frozen=True, kw_only=True)
class StorePreparation(ABC, Generic[DatasetT, JobT]):
    """How the store in ``folder`` is prepared (a `Preparation`).

    Each kind of data says how units are written and how the store is finished and opened. ``JobT``
    is what writing a unit takes.
    """

    kind: ClassVar[str]
    """The kind of store, for messages."""
    manifest: ClassVar[str]
    """The file that is written last."""

    folder: Folder
    origin: Origin
    shards: int
    """At most so many jobs can share the work."""

    @abstractmethod
    def count_processes(self, *, whole: bool) -> int:
        """Number of processes for this work. If one process prepares the ``whole`` store, the
        beginning of the source is checked. Raises UserError for a source that cannot be used."""

    @abstractmethod
    def begin_job(self, claimed: dict[str, Any], processes: int) -> JobT:
        """Writes what all units need. ``claimed``: the record of `origin.claim`."""

    @abstractmethod
    def resume_job(self, claimed: dict[str, Any]) -> JobT:
        """Reads what `begin_job` wrote. Raises UserError if it is not there."""

    @abstractmethod
    def write_share(self, job: JobT, number: int, jobs: int, processes: int) -> None:
        """Writes the missing units of share ``number`` of ``jobs``."""

    @abstractmethod
    def is_complete(self, job: JobT) -> bool:
        """Whether all units are written."""

    @abstractmethod
    def finish(self, job: JobT, processes: int) -> None:
        """Verifies all units and writes the manifest. Raises UserError if the source changed."""

    @abstractmethod
    def read_store(self, *, verified: bool, compare: Compare) -> DatasetT:
        """Opens the finished store. ``verified``: its files need not be compared with checksums."""

    def no_store(self) -> str:
        """The error for a store that is not finished."""
        return (
            f"There is no finished {self.kind} in {self.folder.path}; run `flax-transformers "
            "prepare` with the same config first, in one process."
        )

    def is_finished(self) -> bool:
        """Whether the folder contains a finished store."""
        return self.folder.exists(self.manifest)

    def check(self) -> None:
        """See `Preparation`."""
        if not self.is_finished():
            self.count_processes(whole=True)

    def run(self, compare: Compare = "sizes") -> DatasetT:
        """See `dataset.prepare`. Another process may do the same at the same time."""
        made = False
        if not self.is_finished():
            processes = self.count_processes(whole=True)
            with exclusive_lock(self.folder):
                made = not self.is_finished()
                if made:
                    job = self.begin_job(claim(self.folder, self.origin), processes)
                    self.write_share(job, 0, 1, processes)
                    self.finish(job, processes)
        return self._opened(made, compare)

    def begin(self) -> None:
        """See `dataset.prepare_common`."""
        if not self.is_finished():
            processes = self.count_processes(whole=True)
            with exclusive_lock(self.folder):
                self.begin_job(claim(self.folder, self.origin), processes)

    def share(self, job: int, jobs: int) -> DatasetT | None:
        """See `dataset.prepare_share`. A job may be killed and run again, or run twice at once."""
        require_job(job, jobs, self.shards)
        made = False
        if not self.is_finished():
            processes = self.count_processes(whole=False)
            with shared_lock(self.folder):
                if self.is_finished():  # by another job, while this one waited
                    return self._opened(made)
                work = self.resume_job(claim(self.folder, self.origin, by_size=True))
                self.write_share(work, job, jobs, processes)
            if not self.is_finished() and not self.is_complete(work):
                return None
            with exclusive_lock(self.folder):
                made = not self.is_finished()
                if made:
                    self.finish(work, processes)
        return self._opened(made)

    def open(self, compare: Compare = "nothing") -> DatasetT:
        """See `dataset.open_dataset`."""
        if not self.is_finished():
            raise UserError(self.no_store())
        return self.read_store(verified=False, compare=compare)

    def _opened(self, made: bool, compare: Compare = "nothing") -> DatasetT:
        found = self.read_store(verified=made, compare="nothing" if made else compare)
        found.print_report()
        return found


def read_record(folder: Folder, name: str, made_from: str) -> dict[str, Any] | None:
    """The record of a written unit; None if it is missing, damaged or made from something else."""
    try:
        record = json.loads(folder.read(name))
        return record if record["made_from"] == made_from else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
