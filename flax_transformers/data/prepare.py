"""Text to token store: train or load the tokenizer once, then tokenise every shard once.

Every step ends in a rename and is skipped when found done, so a run that was killed goes on where
it stopped, and its store is byte for byte that of an uninterrupted run:

    corpus.json     what the store is made from; anything else is refused from then on
    tokenizer/      trained on the training documents alone
    shards/N.json   counts and digests of shard N, written when its files are in place
    manifest.json   last, after every file was read again and compared
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flax_transformers.data import sources
from flax_transformers.data.config import TextData
from flax_transformers.data.folders import Folder, LocalFolder, open_folder, writing
from flax_transformers.data.pairs import PairExamples
from flax_transformers.data.pipeline import Examples, TextExamples
from flax_transformers.data.shards import is_held_out, write_shards
from flax_transformers.data.store import (
    MANIFEST,
    SPLITS,
    Split,
    TokenStore,
    read_manifest,
    to_json,
    write_manifest,
)
from flax_transformers.data.tokenizer_kinds import CONFIG_FILE
from flax_transformers.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.contract import Vocabulary, WindowSpec
from flax_transformers.objectives.sequence_to_sequence import PairSpec

CORPUS = "corpus.json"
_LITTLE_TEXT = 8_000_000  # characters; starting processes takes longer than tokenising so much


@dataclass(frozen=True)
class PreparedText:
    """Text in a token store (a `Dataset`). ``validation`` is None where nothing is held out."""

    directory: str
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore | None

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    @property
    def summary(self) -> str:
        held_out = self.validation.num_tokens if self.validation else 0
        return (
            f"{self.train.num_tokens:,} training tokens in {self.train.num_documents:,} documents, "
            f"{held_out:,} held out, {self.tokenizer.kind} of {self.vocabulary.size:,} pieces"
        )

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    def examples(self, split: Split, spec: WindowSpec) -> Examples | None:
        store = self.train if split == "train" else self.validation
        if store is None:
            return None
        if isinstance(spec, PairSpec):
            return PairExamples(store, spec)
        return TextExamples(store, spec)


def prepare_text(
    data: TextData, output: str | os.PathLike[str] | None = None, *, processes: int | None = None
) -> PreparedText:
    """Makes the token store of ``data``, or opens it where it is finished.

    ``output`` goes before ``data.store``, ``processes`` before ``data.prepare_processes``. Safe to
    kill at any time and to call again, also while another process does the same. Prints progress
    on stderr. Raises UserError for an empty corpus, nothing held out although asked for, a
    directory that holds another store, and a disk that is full or read-only.
    """
    folder = open_folder(output or data.store or default_directory(data))
    if folder.exists(MANIFEST):
        return _open(folder, data, _content_if_there(data))
    corpus = _corpus(data)
    little = _check_beginning(data)
    with _only_one(folder):
        if not folder.exists(MANIFEST):
            _claim(folder, corpus)
            tokenizer = _tokenizer(folder, data)
            if processes is None:
                processes = data.prepare_processes or (1 if little else _cores())
            _write(folder, data, corpus, tokenizer, processes)
    return _open(folder, data, corpus["content"])


def open_prepared(data: TextData) -> PreparedText:
    """The finished store of ``data``; reads nothing of the corpus where ``data.store`` is set.

    For several processes at once, none of which may start to write. Raises UserError where there
    is no finished store.
    """
    folder = open_folder(data.store or default_directory(data))
    if not folder.exists(MANIFEST):
        raise UserError(
            f"There is no finished token store in {folder.path}; run `flax-transformers prepare` "
            "with the same config first, in one process."
        )
    return _open(folder, data, None)


def default_directory(data: TextData) -> str:
    """Below the user's cache directory, named after the corpus's content and the settings."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(to_json(_corpus(data))).hexdigest()[:16]
    return os.path.join(cache, "flax_transformers", "stores", name)


def _corpus(data: TextData) -> dict[str, Any]:
    """All that a store's bytes depend on: the settings, and a fingerprint of the content."""
    content = [sources.fingerprint(data.source)]
    if data.validation_source is not None:
        content.append(sources.fingerprint(data.validation_source))
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return {"settings": _settings(data), "content": digest}


def _settings(data: TextData) -> dict[str, Any]:
    names = ("source", "validation_source", "validation_fraction", "tokenizer", "shards")
    chosen = {name: value for name, value in asdict(data).items() if name in names}
    return json.loads(to_json(chosen))


def _content_if_there(data: TextData) -> str | None:
    """A finished store can be used where its corpus is not at hand."""
    try:
        return _corpus(data)["content"]
    except UserError:
        return None


def _open(folder: Folder, data: TextData, content: str | None) -> PreparedText:
    _refuse_other(folder, read_manifest(folder)["corpus"], _settings(data), content)
    tokenizer = _load_tokenizer(folder)
    if data.tokenizer.path is not None and os.path.exists(data.tokenizer.path):
        asked = train_tokenizer(data.tokenizer, ()).fingerprint
        if asked != tokenizer.fingerprint:
            raise UserError(
                f"The token store in {folder.path} was made with tokenizer "
                f"{tokenizer.fingerprint[:12]}, while {data.tokenizer.path} holds {asked[:12]}; "
                "choose another store directory or the tokenizer it was made with."
            )
    train, validation = (
        TokenStore(folder.path, split, tokenizer=tokenizer.fingerprint) for split in SPLITS
    )
    return PreparedText(
        folder.path, tokenizer, train, validation if validation.num_tokens else None
    )


def _claim(folder: Folder, corpus: dict[str, Any]) -> None:
    """From now on the folder belongs to this corpus and these settings."""
    if folder.exists(CORPUS):
        found = json.loads(folder.read(CORPUS))
        _refuse_other(folder, found, corpus["settings"], corpus["content"])
    else:
        folder.write(CORPUS, to_json(corpus))


def _refuse_other(
    folder: Folder, found: dict[str, Any], settings: dict[str, Any], content: str | None
) -> None:
    theirs, ours = _flat(found["settings"]), _flat(settings)
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if names:
        was, asked = (
            ", ".join(f"{name}={side.get(name)!r}" for name in names) for side in (theirs, ours)
        )
    elif content not in (None, found["content"]):
        was = f"corpus {found['content'][:12]} ({ours['source.path']})"
        asked = f"corpus {str(content)[:12]}, as the same files have changed since"
    else:
        return
    raise UserError(
        f"The token store in {folder.path} was made with {was}; this run asks for {asked}; choose "
        "another store directory, or delete that one to make it anew."
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _check_beginning(data: TextData) -> bool:
    """Whether there is so little text that it could be read here; then checks that it will do."""
    fraction = data.held_out_fraction
    characters = documents = held_out = 0
    for _, document in sources.read_documents(data.source):
        documents += 1
        held_out += is_held_out(document, fraction)
        characters += len(document.whole)
        if characters > _LITTLE_TEXT:
            return False
    _check_split(data, documents - held_out, held_out)
    return True


def _check_split(data: TextData, train: int, held_out: int) -> None:
    if train + held_out == 0:
        raise UserError(f"The corpus {data.source.path} is empty: it holds no document with text.")
    if held_out == 0 and data.held_out_fraction > 0:
        raise UserError(
            f"validation_fraction {data.validation_fraction} holds out none of the {train} "
            f"documents of {data.source.path}; raise it, give a validation_source, or set it to 0."
        )
    if train == 0:
        raise UserError(
            f"validation_fraction {data.validation_fraction} holds out all {held_out} documents "
            f"of {data.source.path}; lower it."
        )


@contextlib.contextmanager
def _only_one(folder: Folder) -> Iterator[None]:
    """One writer at a time on a local disk; also clears away what killed writers left.

    Without locks (some network disks, Windows, buckets) two writers at once only do the same work
    twice: each has temporary names of its own and both arrive at the same bytes.
    """
    if not isinstance(folder, LocalFolder):
        yield
        return
    with writing(folder.path):
        os.makedirs(folder.path, exist_ok=True)
        lock = open(os.path.join(folder.path, ".lock"), "a")  # noqa: SIM115
    with lock:
        try:
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for the process that prepares {folder.path}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield
            return
        folder.remove_temporaries()
        try:
            yield
        finally:
            folder.remove_temporaries()  # a killed run's processes may have lived a moment longer


def _tokenizer(folder: Folder, data: TextData) -> Tokenizer:
    """The store's own tokenizer, trained if it is not there. Its config file is written last."""
    if not folder.exists(f"tokenizer/{CONFIG_FILE}"):
        fraction = data.held_out_fraction
        documents = sources.read_documents(data.source)
        kept = (document for _, document in documents if not is_held_out(document, fraction))
        texts = (document.whole.replace("\0", "\n") for document in kept)
        tokenizer = train_tokenizer(data.tokenizer, texts)
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save(scratch)
            files = sorted(Path(scratch).iterdir(), key=lambda file: file.name == CONFIG_FILE)
            for file in files:
                folder.write(f"tokenizer/{file.name}", file.read_bytes())
    return _load_tokenizer(folder)


def _write(
    folder: Folder, data: TextData, corpus: dict[str, Any], tokenizer: Tokenizer, processes: int
) -> None:
    finished = write_shards(folder, data, tokenizer, processes)
    shards = {split: [shard.splits[split] for shard in finished] for split in SPLITS}
    documents = {split: sum(shard.documents for shard in shards[split]) for split in SPLITS}
    _check_split(data, documents["train"], documents["validation"])
    write_manifest(
        folder,
        shards,
        vocab_size=tokenizer.vocabulary.size,
        tokenizer=tokenizer.fingerprint,
        corpus=corpus,
    )
    tokens = {split: sum(shard.tokens for shard in shards[split]) for split in SPLITS}
    empty = sum(shard.empty for shard in finished)
    empty += sum(shard.skipped for split in SPLITS for shard in shards[split])
    print(
        f"Prepared {tokens['train']:,} training and {tokens['validation']:,} held-out tokens of "
        f"{documents['train']:,} and {documents['validation']:,} documents in {folder.path} (left "
        f"out: {empty:,} empty documents, "
        f"{sum(shard.invalid for shard in finished):,} invalid ones)",
        file=sys.stderr,
    )


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_tokenizer(folder: Folder) -> Tokenizer:
    if isinstance(folder, LocalFolder):
        return load_tokenizer(os.path.join(folder.path, "tokenizer"))
    with tempfile.TemporaryDirectory() as scratch:
        for name in folder.names("tokenizer/"):
            Path(scratch, os.path.basename(name)).write_bytes(folder.read(name))
        return load_tokenizer(scratch)
