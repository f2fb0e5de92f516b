"""Pairs of texts, a source and its target.

A pair is a document of a token store whose two sentences are the source and the target, so stores
of pairs are prepared, resumed, checked and read like those of any text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from flax_transformers.data.sources import records, row_files
from flax_transformers.data.sources.corpus_files import ending
from flax_transformers.data.sources.documents import Decoder, Document, Invalid, Where
from flax_transformers.data.sources.files import reading_source
from flax_transformers.data.sources.tfds import PREFIX, TfdsExamples
from flax_transformers.errors import UserError
from flax_transformers.storage.hub import find_data

_SHORT = 20
"""Maximum number of characters of a target that many pairs may share, such as a class."""


@dataclass(frozen=True)
class PairSource(records.Source):
    """A corpus of pairs; used like a `TextSource` (``TextData.source``).

    ``path``: a file, a folder or a glob in the formats of `LabelledSource`; or "tfds:..." as for
    text.
    ``split``: as for a `TextSource`; of files with a ``target_path`` it is not asked.
    ``source_field``, ``target_field``: as for a `LabelledSource` ("translation.de" is field de of
    the object translation). A tsv file whose first line does not name both has no header: numbers
    are then columns from 0, and for other names the first two columns are read.
    ``target_path``: a file with the targets, line by line for the sources in the file ``path``; any
    ending, compressed or not.
    ``strip``: whether whitespace around both texts is removed. Prompts that a chat template has
    rendered may end with line breaks that the model was trained with.

    Pairs with the same target are held out together, because multilingual corpora repeat them. Of
    targets of at most 20 characters, which may be classes or numbers, a sample of pairs is held
    out. A row with one side only is invalid (and left out by ``on_invalid`` "replace"), one with
    none is empty.
    """

    source_field: str = "source"
    target_field: str = "target"
    target_path: str | None = None
    strip: bool = field(default=True, metadata=records.LATER)

    endings: ClassVar[tuple[str, ...]] = row_files.ENDINGS
    target_kind: ClassVar[str] = "pairs"
    store_version: ClassVar[int] = 2  # 1: pairs with the same short target were held out together

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order."""
        if self.target_path is None:
            return super().files()
        found = [Path(find_data(path)).expanduser() for path in (self.path, self.target_path)]
        for path in found:
            with reading_source(path):
                is_file = path.is_file()
            if not is_file:
                raise UserError(f"There is no file {path}; check the path.")
        return [(path.name, path) for path in found]

    @property
    def fields(self) -> tuple[str, str]:
        """The fields of source and target."""
        return self.source_field, self.target_field

    def parts(self) -> Iterator[records.Part]:
        fields = self.fields
        if self.path.startswith(PREFIX):
            yield records.Part(TfdsExamples(self, fields), partial(_row, self))
        elif self.target_path is not None:
            (_, one), (_, other) = self.files()
            yield records.Part(records.TwoFiles(one, other), partial(_parallel_pair, self))
        else:
            listing = self.listing()
            for _, path in listing.files:
                if ending(path, self.endings) == ".tsv":
                    yield records.Part(
                        row_files.ChosenFile(path, partial(_tsv_file, path, fields)),
                        partial(_tsv, self),
                    )
                else:
                    inside = listing.inside
                    rows = row_files.row_file(path, self.split, fields, inside=inside)
                    yield records.Part(rows, partial(_row, self))


def _pair(source: PairSource, one: str, other: str, where: Where) -> Document:
    sides = one.strip(), other.strip()
    if any(sides) and not all(sides):
        raise Invalid(where, f"has no {'target' if sides[0] else 'source'}")
    group = sides[1] if len(sides[1]) > _SHORT else None
    return Document(sides if source.strip else (one, other), group=group)


def _row(source: PairSource, decoder: Decoder, content: Any, where: Where) -> Document:
    row = row_files.row_of(decoder, content, where)
    one, other = (row_files.text_in(decoder, row, name, where) for name in source.fields)
    return _pair(source, one, other, where)


def _tsv_file(path: Path, fields: tuple[str, str]) -> records.Records:
    """Records of a tsv file: rows by name if the first line names both fields, else lines."""
    for line in row_files.first_lines(path, 1):
        names = line.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").rstrip("\r\n")
        if set(fields) <= set(names.split("\t")):
            return records.TableFile(path, "\t", quoted=False, names=fields)
    return records.LineFile(path)


def _tsv(source: PairSource, decoder: Decoder, content: Any, where: Where) -> Document:
    if not isinstance(content, bytes):
        return _row(source, decoder, content, where)
    text = decoder.text(content, where).removeprefix("\ufeff")  # of the first line
    cells = text.rstrip("\r\n").split("\t")
    columns = [int(name) if name.isdecimal() else i for i, name in enumerate(source.fields)]
    if max(columns) >= len(cells):
        raise Invalid(
            where, f"has {len(cells)} columns, but column {max(columns)} (from 0) is asked for"
        )
    return _pair(source, cells[columns[0]], cells[columns[1]], where)


def _parallel_pair(
    source: PairSource,
    decoder: Decoder,
    raws: tuple[bytes | None, bytes | None],
    where: records.PairOfLines,
) -> Document:
    paths = where.path, where.other
    for raw, path, longer in zip(raws, paths, reversed(paths), strict=True):
        if raw is None:
            raise Invalid(path, f"ends before line {where.line}, which {longer} has")
    one, other = (
        decoder.text(raw or b"", f"{path}:{where.line}")
        .removeprefix("\ufeff" if where.line == 1 else "")
        .rstrip("\r\n")
        for raw, path in zip(raws, paths, strict=True)
    )
    return _pair(source, one, other, where)
