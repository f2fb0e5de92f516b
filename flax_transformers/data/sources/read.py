"""Reads the documents of sources in order, by one policy for all.

* NUL characters become spaces, because C libraries treat them as ends of strings.
* Documents without visible characters are skipped and counted as empty.
* Invalid documents (bytes that are not UTF-8, lone surrogates, invalid JSON, a missing or non-text
  field, half of a pair, a record of more than 16 MiB) are handled by the source's ``on_invalid``
  and counted.
* Longer documents of .txt files are cut, between lines or at spaces, to bound the memory.
* A damaged file (a truncated parquet or gzip file, an unreadable TFDS folder) is always an error,
  because the documents that it has lost cannot be counted.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.corpus_files import Unread, list_corpus, plain_suffix
from flax_transformers.data.sources.documents import Counts, Decoder, Document, Invalid
from flax_transformers.data.sources.labelled import ChoiceSource, LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.records import Part, Record, Source
from flax_transformers.data.sources.sharding import Sharding
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.sources.tfds import PREFIX, tfds_files, tfds_identity
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import content_digest, sizes_digest

AnySource = TextSource | PairSource | LabelledSource | TaggedSource | QuestionSource | ChoiceSource

_FIRST_RECORDS = 20


def read_documents(
    source: Source, shard: int = 0, shards: int = 1, counts: Counts | None = None
) -> Iterator[tuple[int, Document]]:
    """The (number, document) of one shard; see `CorpusReader`."""
    reader = CorpusReader(source, range(shard, shard + 1), shards)
    return reader.documents(shard, Counts() if counts is None else counts)


def check_first_records(source: Source) -> None:
    """Raises UserError if none of the first records of the files with one ending is valid, which
    means a wrong setting."""
    decoder = Decoder(source.on_invalid == "replace")
    kinds: dict[str, list[Part]] = {}
    for part in source.parts():
        path = getattr(part.records, "path", None)
        kinds.setdefault("" if path is None else plain_suffix(path), []).append(part)
    for parts in kinds.values():
        found = list(_problems(decoder, parts))
        problems = [problem for problem in found if problem is not None]
        if problems and len(problems) == len(found):
            first = problems[0]
            raise UserError(
                f"None of the first {len(problems)} records of {source.path} is valid ({first}); "
                f"{first.remedy or _to_correct(source)}, or give another path."
            )


def _problems(decoder: Decoder, parts: Sequence[Part]) -> Iterator[Invalid | None]:
    """The errors of the first records, up to a valid one."""
    records = ((part, record) for part in parts for record in part.records.read(0, None))
    for part, record in itertools.islice(records, _FIRST_RECORDS):
        try:
            part.parse(decoder, record.content, record.where)
        except Invalid as problem:
            yield problem
        else:
            yield None
            return


def _to_correct(source: Source) -> str:
    """To correct the settings for the fields of a record, or without such settings the records."""
    names = [f.name for f in fields(source) if f.name.endswith(("_field", "_column"))]
    return f"correct data.source.{', '.join(names)}" if names else "correct the records"


def tied_shards(source: Source, shards: int) -> list[bool]:
    """For each shard, whether writing it requires reading over the one before; see `sharding`."""
    sharding = Sharding([part.records for part in source.parts()], shards)
    return [sharding.tied(shard) for shard in range(shards)]


class CorpusReader:
    """Reads the shards ``run``, in order, in one pass over what they contain.

    Raises UserError for what is missing, damaged or (on_invalid="error") invalid.
    """

    def __init__(self, source: Source, run: Sequence[int], shards: int) -> None:
        if not 0 <= run[0] <= run[-1] < shards:
            raise UserError(f"Shard {run[-1]} of {shards} does not exist; shards count from 0.")
        self.source, self._run = source, run
        self._parts = list(source.parts())
        self._sharding = Sharding([part.records for part in self._parts], shards)
        self._decoder = Decoder(source.on_invalid == "replace")
        self._records = self._found()
        self._next = next(self._records, None)

    def documents(self, shard: int, counts: Counts) -> Iterator[tuple[int, Document]]:
        """(number, document) of a shard of the run; shards must be read in order.

        Numbers include empty and invalid documents, which are counted in ``counts``.
        """
        for number, (part, record) in enumerate(self._of(shard)):
            document = self._document(part, record, counts)
            if document is not None:
                yield number, document

    def _of(self, shard: int) -> Iterator[tuple[Part, Record]]:
        while self._next is not None and self._next[0] <= shard:
            of, part, record = self._next
            self._next = next(self._records, None)
            if of == shard:
                yield part, record

    def _found(self) -> Iterator[tuple[int, Part, Record]]:
        """(shard, part, record) of the records of the run."""
        sharding, shard = self._sharding, self._run[0]
        start, stop = sharding.start(shard), sharding.start(self._run[-1] + 1)
        for part, (first, end) in zip(
            self._parts, itertools.pairwise(sharding.starts), strict=True
        ):
            if first >= stop or (end <= start and first < start):
                continue
            last = stop - first if stop < end else None
            border = sharding.start(shard + 1)
            for record in part.records.read(max(0, start - first), last):
                while first + record.position >= border:
                    shard += 1
                    border = sharding.start(shard + 1)
                yield shard, part, record

    def _document(self, part: Part, record: Record, counts: Counts) -> Document | None:
        decoder = self._decoder
        decoder.replaced = False
        try:
            document = _without_nul(part.parse(decoder, record.content, record.where))
        except Invalid as problem:
            if self.source.on_invalid == "error":
                raise UserError(
                    f"{problem}; {problem.remedy or 'fix it'}, or set on_invalid to skip or "
                    "replace."
                ) from problem
            counts.invalid += 1
            return None
        counts.invalid += decoder.replaced
        whole = document.whole.replace("\0", " ")
        if not whole or whole.isspace():
            counts.empty += 1
            return None
        counts.documents += 1
        counts.cut += record.continues
        return document


def _without_nul(document: Document) -> Document:
    if isinstance(document.text, str):
        if "\0" not in document.text:
            return document
        return replace(document, text=document.text.replace("\0", " "))
    return replace(document, text=tuple(part.replace("\0", " ") for part in document.text))


def fingerprint(source: Source, *, split: bool = True) -> str:
    """sha256 of the content of the corpus, without paths and times.

    Reads the files unless their hash is cached. It includes their order and endings, and the fields
    of the source. Unless of its ``split``, of the files of all splits.
    """
    if source.path == "embedded":
        content = repr([hashlib.sha256(t.encode()).hexdigest() for t in source.embedded_texts()])
    else:
        content = content_digest(_identifying(source, split))
    return _digest(source, content)


def sizes(source: Source, *, split: bool = True) -> str:
    """sha256 of the sizes of the corpus's files; does not read them. ``split``: see
    `fingerprint`."""
    if source.path == "embedded":
        return fingerprint(source)
    return _digest(source, sizes_digest(_identifying(source, split)))


def _digest(source: Source, content: str) -> str:
    chosen = {
        f.name: value
        for f in fields(source)
        if "path" not in f.name and (value := getattr(source, f.name)) != f.default
    }
    facts = tfds_identity(source) if source.path.startswith(PREFIX) else ""
    made_of = (type(source).__name__, chosen, facts, content)
    return hashlib.sha256(repr(made_of).encode()).hexdigest()


def not_read(source: Source) -> tuple[int, Unread]:
    """Bytes of the files that are read, and what is beside them and not read."""
    if source.path.startswith(PREFIX) or source.path == "embedded":
        return 0, {}
    if _is_parallel(source):
        return sum(path.stat().st_size for _, path in source.files()), {}
    listing = source.listing()
    return sum(path.stat().st_size for _, path in listing.files), listing.unread


def _identifying(source: Source, split: bool) -> list[tuple[str, Path]]:
    if source.path.startswith(PREFIX):
        return tfds_files(source.path, source.split)
    files = source.files if split or _is_parallel(source) else partial(_all_files, source)
    return [(os.path.splitext(path.name.lower())[1], path) for _, path in files()]


def _all_files(source: Source) -> list[tuple[str, Path]]:
    """The files of all splits."""
    try:
        return list_corpus(source.path, source.endings).files
    except UserError:  # of a source that finds its files itself
        return source.files()


def _is_parallel(source: Source) -> bool:
    """Whether it is two files that are read together."""
    return getattr(source, "target_path", None) is not None
