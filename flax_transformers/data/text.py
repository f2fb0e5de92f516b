"""Plain text: documents out of txt, jsonl and parquet files, TFDS data, or Python itself.

Documents stream: at most one document (parquet: one small batch of rows) is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from flax_transformers.data import embedded
from flax_transformers.data.documents import LONGEST, Decoder, Document, DocumentOf, Source
from flax_transformers.data.files import (
    corpus_files,
    cut_lines,
    ending,
    lines,
    open_file,
    parquet_rows,
    reading,
)
from flax_transformers.data.tfds_data import PREFIX, tfds_rows, tfds_text

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


@dataclass(frozen=True)
class TextSource(Source):
    """A corpus of texts.

    ``path``: "embedded" (`data.embedded`); a file, a folder or a glob of txt, jsonl (also as
    .json, one object a line) and parquet files, the first two also with .gz; or "tfds:...".
    ``text_field``: the JSON key, parquet column or TFDS feature that holds the text; a list of
    texts in JSON counts as its lines.
    ``documents``: how .txt files divide into documents; empty lines between documents is the
    format of the original BERT. Documents of a .txt file that are longer than 16 MiB are cut.
    """

    text_field: str = "text"
    documents: Literal["blank_line", "file", "line"] = "blank_line"

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order; none for the embedded text."""
        return [] if self.path == "embedded" else corpus_files(self.path, ENDINGS)


def numbered_texts(
    source: TextSource, decoder: Decoder, shard: int, shards: int
) -> Iterator[tuple[int, DocumentOf]]:
    """(number, what decodes it) of the documents whose number % shards == shard."""
    if source.path.startswith(PREFIX):
        for number, row in tfds_rows(source, [source.text_field], shard, shards):
            yield number, partial(_example, decoder, row, source, number)
        return
    items: Iterator[DocumentOf]
    if source.path == "embedded":
        items = (partial(Document, text) for text in embedded.documents())
    else:
        items = (item for _, path in source.files() for item in _items(path, source, decoder))
    for number, document_of in enumerate(items):
        if number % shards == shard:
            yield number, document_of


def _example(decoder: Decoder, row: dict[str, Any], source: TextSource, number: int) -> Document:
    where = f"Example {number} of {source.path}"
    return Document(decoder.text(tfds_text(row, source.text_field, source), where))


def _items(path: Path, source: TextSource, decoder: Decoder) -> Iterator[DocumentOf]:
    kind = ending(path, ENDINGS)
    if kind == ".parquet":
        for where, (raw,) in parquet_rows(path, [source.text_field]):
            yield partial(_cell, decoder, raw, where)
    elif kind in (".json", ".jsonl"):
        for where, line in lines(path):
            yield partial(_json_document, decoder, line, source.text_field, where)
    elif source.documents == "file" and path.stat().st_size <= LONGEST:
        yield partial(_whole_file, path, decoder)
    else:
        with reading(path), open_file(path) as stream:
            for offset, block in _blocks(stream, source.documents):
                yield partial(_txt, decoder, block, path, offset)


def _cell(decoder: Decoder, raw: bytes | None, where: str) -> Document:
    return Document("" if raw is None else decoder.text(raw, where))


def _json_document(decoder: Decoder, raw: bytes, field: str, where: str) -> Document:
    """The text of one JSON line; null counts as an empty document."""
    return Document(decoder.field(decoder.json_row(raw, where), field, where) or "")


def _whole_file(path: Path, decoder: Decoder) -> Document:
    with reading(path), open_file(path) as stream:
        return _txt(decoder, stream.read(LONGEST + 1), path, 0)


def _txt(decoder: Decoder, raw: bytes, path: Path, offset: int) -> Document:
    text = decoder.text(raw, str(path), offset)
    if offset == 0:
        text = text.removeprefix("\ufeff")  # byte order mark
    return Document(text.replace("\r\n", "\n").strip("\n"))


def _blocks(stream: IO[bytes], divided: str) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of lines, of runs of lines between empty ones, or of all there is.

    What would be longer than LONGEST is cut between lines, and lines at spaces.
    """
    offset = start = size = 0
    block: list[bytes] = []
    for line in cut_lines(stream):
        ends = divided == "blank_line" and line.isspace()
        if block and (ends or divided == "line" or size + len(line) > LONGEST):
            yield start, b"".join(block)
            block, size = [], 0
        if not ends:
            start = start if block else offset
            block.append(line)
            size += len(line)
        offset += len(line)
    if block:
        yield start, b"".join(block)
