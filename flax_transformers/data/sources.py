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
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from flax_transformers.data import embedded
from flax_transformers.data.conllu import TaggedSource, numbered_tagged
from flax_transformers.data.documents import Counts, Decoder, Document, DocumentOf, Invalid
from flax_transformers.data.labelled import LabelledSource, numbered_labelled
from flax_transformers.data.pairs import PairSource, numbered_pairs
from flax_transformers.data.squad import QuestionSource, numbered_questions
from flax_transformers.data.text import TextSource, numbered_texts
from flax_transformers.data.tfds_data import PREFIX, tfds_identity
from flax_transformers.errors import UserError

AnySource = TextSource | PairSource | LabelledSource | TaggedSource | QuestionSource

_READERS: dict[type, Callable[[Any, Decoder, int, int], Iterator[tuple[int, DocumentOf]]]] = {
    TextSource: numbered_texts,
    PairSource: numbered_pairs,
    LabelledSource: numbered_labelled,
    TaggedSource: numbered_tagged,
    QuestionSource: numbered_questions,
}


def read_documents(
    source: AnySource, shard: int = 0, shards: int = 1, counts: Counts | None = None
) -> Iterator[tuple[int, Document]]:
    """(document number, document) of the documents whose number % shards == shard.

    Numbers count every document of the source in order, also empty and invalid ones, and do not
    depend on ``shards``; each shard counts only its own in ``counts``. Raises UserError for what
    is missing, damaged or (on_invalid="error") not valid.
    """
    if not 0 <= shard < shards:
        raise UserError(f"Shard {shard} of {shards} does not exist; shards count from 0.")
    counts = counts if counts is not None else Counts()
    decoder = Decoder(source.on_invalid == "replace")
    for number, document_of in _READERS[type(source)](source, decoder, shard, shards):
        decoder.replaced = False
        try:
            document = _without_nul(document_of())
        except Invalid as problem:
            if source.on_invalid == "error":
                raise UserError(
                    f"{problem}; mend it, or set on_invalid to skip or replace."
                ) from problem
            counts.invalid += 1
            continue
        counts.invalid += decoder.replaced
        whole = document.whole.replace("\0", " ")
        if not whole or whole.isspace():
            counts.empty += 1
            continue
        counts.documents += 1
        yield number, document


def _without_nul(document: Document) -> Document:
    if isinstance(document.text, str):
        if "\0" not in document.text:
            return document
        return replace(document, text=document.text.replace("\0", " "))
    return replace(document, text=tuple(part.replace("\0", " ") for part in document.text))


def fingerprint(source: AnySource) -> str:
    """sha256 of what the corpus is, without reading it through.

    Files count by name, size and modification time, TFDS data by its name, version and split
    sizes, the embedded text by its content; the fields that decide what a document is count too.
    """
    chosen = {f.name: getattr(source, f.name) for f in fields(source) if "path" not in f.name}
    digest = hashlib.sha256(repr((type(source).__name__, chosen)).encode())
    if source.path == "embedded":
        for text in embedded.documents():
            digest.update(hashlib.sha256(text.encode()).digest())
    elif source.path.startswith(PREFIX):
        digest.update(tfds_identity(source).encode())
    else:
        for name, path in source.files():
            status = path.stat()
            digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
