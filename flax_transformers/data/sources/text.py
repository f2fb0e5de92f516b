"""Plain text: documents of txt files, records with fields, TFDS data, or Python's own texts.

Documents are streamed: at most one document (for parquet, one small batch of rows) is in memory. A
.json file with one value is read as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from flax_transformers.data.sources import row_files
from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import Decoder, Document, Where
from flax_transformers.data.sources.files import Place
from flax_transformers.data.sources.records import MemoryTexts, Part, Source, TextFile
from flax_transformers.data.sources.row_files import row_of, text_in
from flax_transformers.data.sources.tfds import PREFIX, TfdsExamples


@dataclass(frozen=True)
class TextSource(Source):
    """A corpus of texts.

    ``path``: "embedded" (`embedded`); a file, a folder or a glob of txt files or in the formats of
    `LabelledSource`; or "tfds:...".
    ``split``: of the files, as for every `Source`; of a json file with named splits; or of TFDS.
    ``text_field``: the field of the text, named as for a `LabelledSource`; a list of texts is
    joined by line ends.
    ``documents``: how .txt files are divided into documents; empty lines between documents are the
    format of the original BERT. Documents of a .txt file that are longer than 16 MiB are cut.
    """

    text_field: str = "text"
    documents: Literal["blank_line", "file", "line"] = "blank_line"

    endings: ClassVar[tuple[str, ...]] = (".txt", *row_files.ENDINGS)

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order; none for the embedded text."""
        return [] if self.path == "embedded" else super().files()

    def parts(self) -> Iterator[Part]:
        if self.path.startswith(PREFIX):
            yield Part(TfdsExamples(self, (self.text_field,)), partial(_row, self.text_field))
        elif self.path == "embedded":
            yield Part(MemoryTexts(tuple(self.embedded_texts())), _text)
        else:
            listing = self.listing()
            for _, path in listing.files:
                yield _file_part(path, self, listing.inside)


def _file_part(path: Path, source: TextSource, inside: bool) -> Part:
    if ending(path, source.endings) == ".txt":
        return Part(TextFile(path, source.documents), _txt)
    records = row_files.row_file(path, source.split, (source.text_field,), inside=inside)
    return Part(records, partial(_row, source.text_field))


def _text(decoder: Decoder, text: str, where: Where) -> Document:
    return Document(text)


def _row(field: str, decoder: Decoder, content: Any, where: Where) -> Document:
    return Document(text_in(decoder, row_of(decoder, content, where), field, where))


def _txt(decoder: Decoder, raw: bytes, place: Place) -> Document:
    text = decoder.text(raw, place.path, place.offset)
    # A file that was made of several ones has the byte order mark of each.
    return Document(text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n"))
