"""Plain text: documents out of txt files, records with fields, TFDS data, or Python itself.

Documents stream: at most one document (parquet: one small batch of rows) is in memory at a time. A
.json file that is one value is read whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flax_transformers.data.sources import embedded, row_files
from flax_transformers.data.sources.corpus_files import corpus_files, ending
from flax_transformers.data.sources.documents import Decoder, Document, Source, Where
from flax_transformers.data.sources.files import Place
from flax_transformers.data.sources.records import Part, TextFile, Texts
from flax_transformers.data.sources.row_files import row_of, text_in
from flax_transformers.data.sources.tfds import PREFIX, Examples

ENDINGS = (".txt", *row_files.ENDINGS)


@dataclass(frozen=True)
class TextSource(Source):
    """A corpus of texts.

    ``path``: "embedded" (`data.embedded`); a file, a folder or a glob of txt and of the formats
    of records that `LabelledSource` names; or "tfds:...".
    ``split``: of TFDS, or of a json file that names its splits.
    ``text_field``: the field that holds the text, named as for a `LabelledSource`; a list of texts
    counts as its lines.
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
        yield Part(Examples(source, (source.text_field,)), partial(_row, source.text_field))
    elif source.path == "embedded":
        yield Part(Texts(tuple(embedded.documents())), _text)
    else:
        for _, path in source.files():
            yield _file_part(path, source)


def _file_part(path: Path, source: TextSource) -> Part:
    if ending(path, ENDINGS) == ".txt":
        return Part(TextFile(path, source.documents), _txt)
    records = row_files.row_file(path, source.split, (source.text_field,))
    return Part(records, partial(_row, source.text_field))


def _text(decoder: Decoder, text: str, where: Where) -> Document:
    return Document(text)


def _row(field: str, decoder: Decoder, content: Any, where: Where) -> Document:
    return Document(text_in(decoder, row_of(decoder, content, where), field, where))


def _txt(decoder: Decoder, raw: bytes, place: Place) -> Document:
    text = decoder.text(raw, place.path, place.offset)
    if place.offset == 0:
        text = text.removeprefix("\ufeff")  # byte order mark
    return Document(text.replace("\r\n", "\n").strip("\n"))
