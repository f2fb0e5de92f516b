"""Documents out of any kind of source, in order and by one policy.

What holds for every source:

* NUL characters become spaces, because C code below treats them as ends of strings.
* Documents without any visible character are skipped and counted as empty.
* Documents that are not valid (bytes that are not UTF-8, lone surrogates, bad JSON, a missing or
  non-text field, half of a pair, a row of more than 16 MiB) follow the source's ``on_invalid`` and
  are counted.
* Longer documents of .txt files are cut, between lines or at spaces, so nothing needs much memory.
* A damaged file (a parquet or gzip file that is cut short, a TFDS folder that does not read) is
  refused by name whatever the policy: what it has lost cannot be counted.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flax_transformers.data.sources import conllu, embedded, labelled, pairs, squad, text
from flax_transformers.data.sources.conllu import TaggedSource, tagged_parts
from flax_transformers.data.sources.corpus_files import Unread, list_corpus, plain_suffix
from flax_transformers.data.sources.documents import Counts, Decoder, Document, Invalid
from flax_transformers.data.sources.labelled import LabelledSource, labelled_parts
from flax_transformers.data.sources.pairs import PairSource, pair_parts
from flax_transformers.data.sources.records import Part, Record
from flax_transformers.data.sources.sharding import Dealing
from flax_transformers.data.sources.squad import QuestionSource, question_parts
from flax_transformers.data.sources.text import TextSource, text_parts
from flax_transformers.data.sources.tfds import PREFIX, tfds_files, tfds_identity
from flax_transformers.errors import UserError
from flax_transformers.storage.file_hashes import content_digest, sizes_digest

AnySource = TextSource | PairSource | LabelledSource | TaggedSource | QuestionSource

_FIRST_RECORDS = 20

_ENDINGS: dict[type, tuple[str, ...]] = {
    TextSource: text.ENDINGS,
    PairSource: pairs.ENDINGS,
    LabelledSource: labelled.ENDINGS,
    TaggedSource: conllu.ENDINGS,
    QuestionSource: squad.ENDINGS,
}

_PARTS: dict[type, Callable[[Any], Iterator[Part]]] = {
    TextSource: text_parts,
    PairSource: pair_parts,
    LabelledSource: labelled_parts,
    TaggedSource: tagged_parts,
    QuestionSource: question_parts,
}


def read_documents(
    source: AnySource, shard: int = 0, shards: int = 1, counts: Counts | None = None
) -> Iterator[tuple[int, Document]]:
    """The (number, document) of one shard; see `CorpusReader`."""
    reader = CorpusReader(source, range(shard, shard + 1), shards)
    return reader.documents(shard, Counts() if counts is None else counts)


def check_first_records(source: AnySource) -> None:
    """Raises UserError if none of the first records of files of one ending is a valid document,
    which is a wrong setting and not a bad record; leaving such documents out would leave none."""
    decoder = Decoder(source.on_invalid == "replace")
    kinds: dict[str, list[Part]] = {}
    for part in _PARTS[type(source)](source):
        path = getattr(part.records, "path", None)
        kinds.setdefault("" if path is None else plain_suffix(path), []).append(part)
    for parts in kinds.values():
        problems = list(_problems(decoder, parts))
        if problems and None not in problems:
            raise UserError(
                f"None of the first {len(problems)} records of {source.path} is valid "
                f"({problems[0]}); set data.source.{_field_settings(source)} to what is there, or "
                "give another path."
            )


def _problems(decoder: Decoder, parts: Sequence[Part]) -> Iterator[Invalid | None]:
    """What is wrong with each of the first records, up to one that is valid."""
    records = ((part, record) for part in parts for record in part.records.read(0, None))
    for part, record in itertools.islice(records, _FIRST_RECORDS):
        try:
            part.parse(decoder, record.content, record.where)
        except Invalid as problem:
            yield problem
        else:
            yield None
            return


def _field_settings(source: AnySource) -> str:
    """The settings that say where in a record the text is."""
    names = [f.name for f in fields(source) if f.name.endswith(("_field", "_column"))]
    return ", ".join(names) or "split"


def tied_shards(source: AnySource, shards: int) -> list[bool]:
    """Of every shard, whether writing it takes reading over the one before; see `dealing`."""
    dealing = Dealing([part.records for part in _PARTS[type(source)](source)], shards)
    return [dealing.tied(shard) for shard in range(shards)]


class CorpusReader:
    """Reads the shards ``run``, in order, in one pass over no more than what they hold.

    Raises UserError for what is missing, damaged or (on_invalid="error") not valid.
    """

    def __init__(self, source: AnySource, run: Sequence[int], shards: int) -> None:
        if not 0 <= run[0] <= run[-1] < shards:
            raise UserError(f"Shard {run[-1]} of {shards} does not exist; shards count from 0.")
        self.source, self._run = source, run
        self._parts = list(_PARTS[type(source)](source))
        self._dealing = Dealing([part.records for part in self._parts], shards)
        self._decoder = Decoder(source.on_invalid == "replace")
        self._records = self._found()
        self._next = next(self._records, None)

    def documents(self, shard: int, counts: Counts) -> Iterator[tuple[int, Document]]:
        """(number, document) of a shard of the run; a later one than in the call before.

        Numbers count the documents of the shard in order, also empty and invalid ones, which are
        counted in ``counts``.
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
        dealing, shard = self._dealing, self._run[0]
        start, stop = dealing.start(shard), dealing.start(self._run[-1] + 1)
        for part, (first, end) in zip(self._parts, itertools.pairwise(dealing.starts), strict=True):
            if first >= stop or (end <= start and first < start):
                continue
            last = stop - first if stop < end else None
            border = dealing.start(shard + 1)
            for record in part.records.read(max(0, start - first), last):
                while first + record.position >= border:
                    shard += 1
                    border = dealing.start(shard + 1)
                yield shard, part, record

    def _document(self, part: Part, record: Record, counts: Counts) -> Document | None:
        decoder = self._decoder
        decoder.replaced = False
        try:
            document = _without_nul(part.parse(decoder, record.content, record.where))
        except Invalid as problem:
            if self.source.on_invalid == "error":
                raise UserError(
                    f"{problem}; fix it, or set on_invalid to skip or replace."
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


def fingerprint(source: AnySource) -> str:
    """sha256 of what the corpus holds, wherever it lies and however old it is.

    Reads the files, unless that was done before. Their order and endings count, and the fields that
    decide what a document is.
    """
    if source.path == "embedded":
        content = repr([hashlib.sha256(t.encode()).hexdigest() for t in embedded.documents()])
    else:
        content = content_digest(_identifying(source))
    return _digest(source, content)


def sizes(source: AnySource) -> str:
    """sha256 of the sizes of the corpus's files, which are found without reading them."""
    if source.path == "embedded":
        return fingerprint(source)
    return _digest(source, sizes_digest(_identifying(source)))


def _digest(source: AnySource, content: str) -> str:
    chosen = {
        f.name: value
        for f in fields(source)
        if "path" not in f.name and (value := getattr(source, f.name)) != f.default
    }
    facts = tfds_identity(source) if source.path.startswith(PREFIX) else ""
    made_of = (type(source).__name__, chosen, facts, content)
    return hashlib.sha256(repr(made_of).encode()).hexdigest()


def not_read(source: AnySource) -> tuple[int, Unread]:
    """How many bytes of files are read, and what lies beside them and is not."""
    if source.path.startswith(PREFIX) or source.path == "embedded":
        return 0, {}
    if getattr(source, "target_path", None) is not None:
        return sum(path.stat().st_size for _, path in source.files()), {}
    listing = list_corpus(source.path, _ENDINGS[type(source)])
    return sum(path.stat().st_size for _, path in listing.files), listing.unread


def _identifying(source: AnySource) -> list[tuple[str, Path]]:
    if source.path.startswith(PREFIX):
        return tfds_files(source.path, source.split)
    return [(os.path.splitext(path.name.lower())[1], path) for _, path in source.files()]
