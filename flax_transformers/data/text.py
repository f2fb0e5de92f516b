"""Plain text: documents out of txt, jsonl and parquet files, TFDS data, or Python itself.

Documents stream: at most one document (parquet: one small batch of rows) is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flax_transformers.data import embedded
from flax_transformers.data.documents import Decoder, Document, Source, Where
from flax_transformers.data.files import Place, corpus_files, ending
from flax_transformers.data.parquet_file import ParquetFile
from flax_transformers.data.records import LineFile, Part, TextFile, Texts
from flax_transformers.data.tfds_data import PREFIX, Examples, tfds_text

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


def text_parts(source: TextSource) -> Iterator[Part]:
    """The parts of a corpus of texts, in order."""
    if source.path.startswith(PREFIX):
        yield Part(Examples(source, (source.text_field,)), partial(_example, source))
    elif source.path == "embedded":
        yield Part(Texts(tuple(embedded.documents())), _text)
    else:
        for _, path in source.files():
            yield _file_part(path, source)


def _file_part(path: Path, source: TextSource) -> Part:
    kind = ending(path, ENDINGS)
    if kind == ".parquet":
        return Part(ParquetFile(path, (source.text_field,)), _cell)
    if kind in (".json", ".jsonl"):
        return Part(LineFile(path), partial(_json_document, source.text_field))
    return Part(TextFile(path, source.documents), _txt)


def _text(decoder: Decoder, text: str, where: Where) -> Document:
    return Document(text)


def _example(source: TextSource, decoder: Decoder, row: dict[str, Any], where: Where) -> Document:
    return Document(decoder.text(tfds_text(row, source.text_field, source), where))


def _cell(decoder: Decoder, cells: tuple[bytes | None], where: Where) -> Document:
    return Document("" if cells[0] is None else decoder.text(cells[0], where))


def _json_document(field: str, decoder: Decoder, raw: bytes, where: Where) -> Document:
    """The text of one JSON line; null counts as an empty document."""
    return Document(decoder.field(decoder.json_row(raw, where), field, where) or "")


def _txt(decoder: Decoder, raw: bytes, place: Place) -> Document:
    text = decoder.text(raw, place.path, place.offset)
    if place.offset == 0:
        text = text.removeprefix("\ufeff")  # byte order mark
    return Document(text.replace("\r\n", "\n").strip("\n"))
