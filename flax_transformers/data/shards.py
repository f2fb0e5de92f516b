"""Tokenises the shards of a store, in this process or in several, with progress on stderr."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flax_transformers.data import sources
from flax_transformers.data.config import TextData
from flax_transformers.data.documents import Counts, Document
from flax_transformers.data.folders import Folder, open_folder
from flax_transformers.data.processes import end_with_parent
from flax_transformers.data.sentences import split_sentences
from flax_transformers.data.store import (
    SPLITS,
    ShardRecord,
    ShardWriter,
    Split,
    check_files,
    to_json,
)
from flax_transformers.data.tokenizers import Tokenizer
from flax_transformers.errors import UserError

_CHUNK = 1 << 18  # characters tokenised at once

Note = Callable[[int, int], None]  # told of (documents, tokens) now and then; may raise to stop


@dataclass(frozen=True)
class FinishedShard:
    """One shard of every split; ``empty`` and ``invalid`` documents were left out of it."""

    tokenizer: str
    empty: int
    invalid: int
    splits: dict[Split, ShardRecord]


def finished_shards(folder: Folder, count: int, tokenizer: str) -> dict[int, FinishedShard]:
    """The shards that are done, by number, with this tokenizer's fingerprint."""
    found = {}
    for shard in range(count):
        try:
            record = json.loads(folder.read(_record_name(shard)))
            splits = {split: ShardRecord.from_json(record["splits"][split]) for split in SPLITS}
            finished = FinishedShard(**{**record, "splits": splits})
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent or damaged: not done
            continue
        if finished.tokenizer == tokenizer:
            found[shard] = finished
    return found


def _record_name(shard: int) -> str:
    return f"shards/{shard:05d}.json"


def write_shards(
    folder: Folder, data: TextData, tokenizer: Tokenizer, processes: int
) -> list[FinishedShard]:
    """Brings all shards into being and reads every file again to compare it with its digest.

    A finished shard whose files do not agree with its record is made once more.
    """
    _write_missing(folder, data, tokenizer, processes)
    damaged = _damaged_shards(folder, data, tokenizer)
    if damaged:
        for shard, error in damaged.items():
            print(f"Tokenising shard {shard + 1} again: {error}", file=sys.stderr)
            folder.delete(_record_name(shard))
        _write_missing(folder, data, tokenizer, processes)
        for error in _damaged_shards(folder, data, tokenizer).values():
            raise error
    finished = finished_shards(folder, data.shards, tokenizer.fingerprint)
    return [finished[shard] for shard in range(data.shards)]


def _write_missing(folder: Folder, data: TextData, tokenizer: Tokenizer, processes: int) -> None:
    finished = finished_shards(folder, data.shards, tokenizer.fingerprint)
    missing = [shard for shard in range(data.shards) if shard not in finished]
    with _Reporter(data.shards, len(finished)) as reporter:
        if processes == 1 or len(missing) <= 1:
            for shard in missing:
                tokenise_shard(folder, data, tokenizer, shard, reporter.note)
                reporter.shard_done()
        else:
            _in_processes(folder, data, tokenizer, missing, processes, reporter)


def _damaged_shards(folder: Folder, data: TextData, tokenizer: Tokenizer) -> dict[int, UserError]:
    damaged = {}
    for shard, record in finished_shards(folder, data.shards, tokenizer.fingerprint).items():
        try:
            for split in SPLITS:
                check_files(folder, record.splits[split])
        except UserError as error:
            damaged[shard] = error
    return damaged


def tokenise_shard(
    folder: Folder, data: TextData, tokenizer: Tokenizer, shard: int, note: Note
) -> None:
    """Writes one shard of both splits, and its record last."""
    size = tokenizer.vocabulary.size
    counts = Counts()
    fraction = data.held_out_fraction
    train, validation = (ShardWriter(folder, split, shard, size) for split in SPLITS)
    with train, validation:
        for chunk in _chunks(sources.read_documents(data.source, shard, data.shards, counts)):
            tokens = 0
            for document, sentences in zip(chunk, _encode(tokenizer, chunk), strict=True):
                writer = validation if is_held_out(document, fraction) else train
                tokens += writer.add_document(sentences)
            note(len(chunk), tokens)
        if data.validation_source is not None:
            documents = sources.read_documents(data.validation_source, shard, data.shards, counts)
            for chunk in _chunks(documents):
                note(len(chunk), sum(map(validation.add_document, _encode(tokenizer, chunk))))
        splits: dict[Split, ShardRecord] = {
            "train": train.finish(),
            "validation": validation.finish(),
        }
    finished = FinishedShard(tokenizer.fingerprint, counts.empty, counts.invalid, splits)
    folder.write(_record_name(shard), to_json(asdict(finished)))


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document goes to "validation"; its group or text decides, not place or shard."""
    key = document.whole if document.group is None else document.group
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _chunks(documents: Iterable[tuple[int, Document]]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for _, document in documents:
        chunk.append(document)
        characters += len(document.whole)
        if characters >= _CHUNK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[list[np.ndarray]]:
    """The token ids of each sentence of each document, all encoded in one call.

    Texts that stand apart count as sentences; there are none where one of them has no token.
    """
    sentences = [
        split_sentences(document.text) if isinstance(document.text, str) else document.text
        for document in documents
    ]
    encoded = iter(tokenizer.encode_batch([one for several in sentences for one in several]))
    for document, several in zip(documents, sentences, strict=True):
        ids = list(itertools.islice(encoded, len(several)))
        apart = not isinstance(document.text, str)
        yield [] if apart and not all(map(len, ids)) else ids


@dataclass(frozen=True)
class _Job:
    """What a worker process needs, handed over once."""

    folder: str
    data: TextData
    tokenizer: Tokenizer
    progress: Any  # shared array of int64: documents, tokens
    stop: Any  # shared event


_job: _Job | None = None


class _Stopped(Exception):
    """Another process failed; this one gives up."""


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each


def _run_in_worker(shard: int) -> None:
    job = _job
    assert job is not None

    def note(documents: int, tokens: int) -> None:
        if job.stop.is_set():
            raise _Stopped
        with job.progress.get_lock():
            job.progress[0] += documents
            job.progress[1] += tokens

    tokenise_shard(open_folder(job.folder), job.data, job.tokenizer, shard, note)


def _in_processes(
    folder: Folder,
    data: TextData,
    tokenizer: Tokenizer,
    shards: list[int],
    processes: int,
    reporter: _Reporter,
) -> None:
    context = multiprocessing.get_context("spawn")
    job = _Job(folder.path, data, tokenizer, context.Array("q", 2), context.Event())
    pool = ProcessPoolExecutor(min(processes, len(shards)), context, _start_worker, (job,))
    try:
        waiting: set[Future[None]] = {pool.submit(_run_in_worker, shard) for shard in shards}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            reporter.set(*job.progress[:])
            for future in done:
                future.result()
                reporter.shard_done()
    except BrokenProcessPool as error:
        raise UserError(
            "A process that tokenises died, perhaps for want of memory; run the same command again "
            "to go on, with fewer prepare_processes. (A script that prepares needs its "
            '`if __name__ == "__main__"`.)'
        ) from error
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)


class _Reporter:
    """A progress bar where stderr is a terminal, else a line for every finished shard."""

    def __init__(self, shards: int, done: int) -> None:
        self._shards, self._done, self._missing = shards, done, shards - done
        self._documents = self._tokens = 0
        console = Console(stderr=True)
        self._lines = not console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("tokenising"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} shards  {task.fields[counts]}"),
            TimeElapsedColumn(),
            console=console,
            disable=self._lines,
        )
        self._task = self._bar.add_task("", total=shards, completed=done, counts="")

    def __enter__(self) -> _Reporter:
        if self._missing:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def note(self, documents: int, tokens: int) -> None:
        self.set(self._documents + documents, self._tokens + tokens)

    def set(self, documents: int, tokens: int) -> None:
        self._documents, self._tokens = documents, tokens
        self._bar.update(self._task, counts=self._counts())

    def _counts(self) -> str:
        return f"{self._documents:,} documents, {self._tokens:,} tokens"

    def shard_done(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if self._lines:
            line = f"tokenised shard {self._done} of {self._shards}: {self._counts()}"
            print(line, file=sys.stderr, flush=True)
