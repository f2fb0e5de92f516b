"""Cost of preparing a token store: bytes read, seconds and memory, by shards and processes.

    python benchmarks/prepare.py --folder /tmp/prepare [--gigabytes 10] > result.md

Random corpora of ``--gigabytes`` of text are generated, one in each of ``--formats``. The first is
prepared by one process with each number of ``--shards`` (none: skipped), with bytes as tokens. Then
each corpus is prepared with ``--parallel-shards`` by one process and by two, with
``--parallel-tokenizer`` (a WordPiece tokenizer trained before, or bytes), and the bytes of both
stores are compared. With ``--peers-python``, an interpreter that has ``datasets`` and
``transformers``, their tokenization of the same JSON lines with the same WordPiece tokenizer is
measured too. Every measurement is a separate process with an empty cache. Bytes read are those of
all system calls of the process and its children (``rchar`` in /proc/self/io): hashing the corpus,
tokenizing it, and reading the store again to verify it. CPU seconds are more
reliable than seconds if other jobs run on the machine.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset, prepare
from flax_transformers.data.sources.read import read_documents
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer

FORMATS = ("jsonl", "parquet", "txt", "jsonl.gz")
_ROW_GROUP = 10_000
_SENTENCES = 200_000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Measured:
    """One store. A megabyte is 10^6 bytes; ``open_seconds`` excludes verification of contents."""

    format: str
    shards: int
    processes: int
    tokenizer: str
    corpus_mb: float
    read_mb: float
    store_mb: float
    seconds: float
    cpu_seconds: float
    peak_mb: float
    open_seconds: float
    tokens: int
    sha256: str


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(asdict(_measured(**json.loads(options.measure)))))
        return
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in options.formats:
        _make_corpus(_corpus(folder, kind), kind, int(options.gigabytes * 1e9))
    _make_tokenizer(folder, options.formats[0])
    by_shards = [
        _measure(folder, options.formats[0], shards, 1, "bytes") for shards in options.shards
    ]
    by_processes = [
        _measure(folder, kind, options.parallel_shards, processes, options.parallel_tokenizer)
        for kind in options.formats
        for processes in (1, 2)
    ]
    peers = _peers(folder, options.peers_python) if options.peers_python else {}
    if options.json:
        rows = [json.dumps(asdict(row)) + "\n" for row in (*by_shards, *by_processes)]
        Path(options.json).write_text("".join(rows))
    _report(options.gigabytes, by_shards, by_processes)
    _report_peers(_corpus(folder, "jsonl").stat().st_size / 1e6, by_processes, peers)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--folder", required=True, help="folder of the corpora and stores")
    parser.add_argument("--gigabytes", type=float, default=0.1, help="size of each corpus")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["jsonl", "parquet"])
    parser.add_argument("--shards", nargs="*", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--parallel-shards", type=int, default=64)
    parser.add_argument("--parallel-tokenizer", choices=("wordpiece", "bytes"), default="wordpiece")
    parser.add_argument("--peers-python", help="also measure Hugging Face's libraries with it")
    parser.add_argument("--json", help="also write one JSON line per measurement to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers_python and (
        "jsonl" not in options.formats or options.parallel_tokenizer != "wordpiece"
    ):
        parser.error("--peers-python needs jsonl among --formats, and WordPiece")
    return options


def _corpus(folder: Path, kind: str) -> Path:
    return folder / f"corpus.{kind}"


def _texts(size: int) -> Iterator[str]:
    """Documents of sentences, with words by Zipf's law; so many bytes in total. Sentences recur, so
    that 10 GB are made in minutes."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(30_000)])
    drawn = words[np.minimum(rng.zipf(1.3, (_SENTENCES, 12)), len(words)) - 1]
    sentences = [" ".join(chosen).capitalize() for chosen in drawn]
    while size > 0:
        chosen = rng.integers(0, _SENTENCES, rng.integers(4, 50)).tolist()
        text = ". ".join([sentences[i] for i in chosen]) + "."
        size -= len(text)
        yield text


def _make_corpus(path: Path, kind: str, size: int) -> None:
    if path.exists():
        return
    print(f"Making {path}", file=sys.stderr)
    temporary = path.with_name(f"{path.name}.part")
    if kind == "parquet":
        _write_parquet(temporary, size)
    else:
        opened = gzip.open if kind.endswith(".gz") else open
        with opened(temporary, "wt") as file:
            for text in _texts(size):
                file.write(f"{text}\n\n" if kind == "txt" else json.dumps({"text": text}) + "\n")
    os.replace(temporary, path)


def _write_parquet(path: Path, size: int) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        rows: list[str] = []
        for text in _texts(size):
            rows.append(text)
            if len(rows) == _ROW_GROUP:
                writer.write_table(pyarrow.table({"text": rows}, schema))
                rows = []
        writer.write_table(pyarrow.table({"text": rows}, schema))


def _make_tokenizer(folder: Path, kind: str) -> None:
    if (folder / "wordpiece").exists():
        return
    documents = read_documents(TextSource(str(_corpus(folder, kind))))
    config = TokenizerConfig("wordpiece", 8000, training_documents=5000)
    train_tokenizer(config, (document.whole for _, document in documents)).save(
        folder / "wordpiece"
    )


def _measure(folder: Path, kind: str, shards: int, processes: int, tokenizer: str) -> Measured:
    """Measures in a separate process with an empty cache."""
    print(f"{kind}: {shards} shards, {processes} processes, {tokenizer}", file=sys.stderr)
    cache = folder / "cache"
    asked = {
        "folder": str(folder),
        "kind": kind,
        "shards": shards,
        "processes": processes,
        "tokenizer": tokenizer,
    }
    done = subprocess.run(
        [sys.executable, __file__, "--folder", str(folder), "--measure", json.dumps(asked)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    shutil.rmtree(cache, ignore_errors=True)
    return Measured(**json.loads(done.stdout))


def _measured(folder: str, kind: str, shards: int, processes: int, tokenizer: str) -> Measured:
    store = Path(folder, "store")
    shutil.rmtree(store, ignore_errors=True)
    path = _corpus(Path(folder), kind)
    saved = str(Path(folder, tokenizer)) if tokenizer == "wordpiece" else None
    data = TextData(
        source=TextSource(str(path)),
        tokenizer=TokenizerConfig("wordpiece" if saved else "bytes", path=saved),
        shards=shards,
        store=str(store),
    )
    read, cpu, began = _read(), _cpu(), time.monotonic()
    prepared = prepare(replace(data, prepare_processes=processes))
    seconds, cpu, read = time.monotonic() - began, _cpu() - cpu, _read() - read
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    began = time.monotonic()
    open_dataset(replace(data, verify=False))
    opened = time.monotonic() - began
    files = [file for file in store.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    digest = _digest(store, files)
    shutil.rmtree(store)
    return Measured(
        kind, shards, processes, tokenizer, path.stat().st_size / 1e6, read / 1e6, size / 1e6,
        seconds, cpu, peak / 1e3, opened, prepared.train.num_tokens, digest,
    )  # fmt: skip


def _peers(folder: Path, python: str) -> dict[str, float]:
    """Seconds of Hugging Face's libraries on the corpus of JSON lines."""
    ways = {
        "`tokenizers`, encode_batch alone": ("encode_batch", 1),
        "`datasets`, map": ("map", 1),
        "`datasets`, map, two processes": ("map", 2),
    }
    script = str(Path(__file__).with_name("prepare_peers.py"))
    found = {}
    for name, (way, processes) in ways.items():
        print(name, file=sys.stderr)
        arguments = [str(_corpus(folder, "jsonl")), str(folder / "wordpiece"), way, str(processes)]
        done = subprocess.run([python, script, *arguments], stdout=subprocess.PIPE, check=True)
        found[name] = json.loads(done.stdout)["seconds"]
    return found


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _cpu() -> float:
    found = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def _digest(store: Path, files: list[Path]) -> str:
    hashed = hashlib.sha256()
    for file in sorted(files):
        if file.name != ".lock":
            hashed.update(str(file.relative_to(store)).encode())
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    hashed.update(block)
    return hashed.hexdigest()


def _report(gigabytes: float, by_shards: list[Measured], by_processes: list[Measured]) -> None:
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, load "
        f"{os.getloadavg()[0]:.1f} at the end; {gigabytes:g} GB of text in each corpus.\n"
    )
    if by_shards:
        _report_shards(by_shards)
    named = {"wordpiece": "WordPiece", "bytes": "bytes as tokens"}[by_processes[0].tokenizer]
    print(f"\n## By processes: {by_processes[0].shards} shards, {named}\n")
    pairs = zip(by_processes[::2], by_processes[1::2], strict=True)
    rows = [
        (
            one.format, f"{one.corpus_mb:,.0f}", f"{one.seconds:.1f}", f"{two.seconds:.1f}",
            f"{one.seconds / two.seconds:.2f}", f"{one.cpu_seconds:.1f}", f"{two.cpu_seconds:.1f}",
            f"{two.read_mb / one.read_mb:.2f}", "yes" if one.sha256 == two.sha256 else "NO",
        )
        for one, two in pairs
    ]  # fmt: skip
    _table(
        ("corpus", "MB", "s, one", "s, two", "times as fast", "CPU s, one", "CPU s, two",
         "MB read, two to one", "equal bytes"), rows
    )  # fmt: skip


def _report_shards(by_shards: list[Measured]) -> None:
    print(f"## By shards: {by_shards[0].format}, bytes as tokens, one process\n")
    rows = [
        (
            f"{row.shards:,}", f"{row.read_mb:,.0f}", f"{row.read_mb / by_shards[0].read_mb:.2f}",
            f"{row.store_mb:,.0f}", f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}",
            f"{row.peak_mb:.0f}", f"{row.open_seconds:.2f}",
        )
        for row in by_shards
    ]  # fmt: skip
    heads = ("shards", "MB read", "of those at the first", "MB of store", "s", "CPU s", "peak MB")
    _table((*heads, "s to open"), rows)


def _report_peers(megabytes: float, by_processes: list[Measured], peers: dict[str, float]) -> None:
    if not peers:
        return
    print("\n## Beside Hugging Face's libraries: JSON lines, WordPiece\n")
    ours = {
        f"`prepare`, {'one process' if row.processes == 1 else 'two processes'}": row.seconds
        for row in by_processes
        if row.format == "jsonl"
    }
    rows = [(name, f"{s:.1f}", f"{megabytes / s:.2f}") for name, s in (ours | peers).items()]
    _table(("what", "s", "MB/s"), rows)


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    for row in (heads, ("---", *["---:"] * (len(heads) - 1)), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
