"""Tagged sentences: words, each with a tag, in CoNLL-U and the other formats of columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.data.sources.corpus_files import corpus_files
from flax_transformers.data.sources.documents import Decoder, Document, Invalid, LabelKind, Source
from flax_transformers.data.sources.files import Place
from flax_transformers.data.sources.labelled import class_name
from flax_transformers.data.sources.records import Part, TextFile, too_long
from flax_transformers.ranges import Ranges

ENDINGS = (".conllu", ".iob2", ".conll", ".tsv", ".txt")
_NO_WORD = re.compile(r"\d+[-.]\d+")  # "3-4" spans two words, "3.1" is left out of the text


@dataclass(frozen=True)
class TaggedSource(Source):
    """A corpus of tagged sentences; goes where a `TextSource` goes (``TextData.source``).

    ``path``: a file, a folder or a glob of CoNLL-U or any files with a word a line, columns
    divided by tabs or, where there is none, by blanks, and an empty line after a sentence;
    compressed or not.
    ``word_column``, ``tag_column``: from 0, or from the end below it. The defaults are the form and
    the universal tag of CoNLL-U; for entities (IOB2) with the word's number in front 1 and 2, for
    CoNLL-2003 0 and 3.
    ``label_names``: the tags in the order of their numbers; by default those of the training
    sentences, sorted.

    Words count as in the evaluation of Universal Dependencies: ranges of words ("3-4") and empty
    nodes ("3.1") are left out. Comments before a sentence, and -DOCSTART-, are too. A sentence with
    a line that lacks a column, or an unknown tag, is not valid. A word is tokenized as the first
    of a text is, or behind a space (`Tokenizer.encode_words`).
    """

    word_column: int = 1
    tag_column: int = 3
    label_names: tuple[str, ...] = ()

    RANGES: ClassVar[Ranges] = dict.fromkeys(
        ("word_column", "tag_column"), ranges.integers(-10_000, 10_000)
    )

    label_kind: ClassVar[LabelKind] = "tags"

    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of the files that are read, in order."""
        return corpus_files(self.path, ENDINGS)


def tagged_parts(source: TaggedSource) -> Iterator[Part]:
    """The parts of a corpus of tagged sentences, in order."""
    for _, path in source.files():
        yield Part(TextFile(path, "blank_line", cut=False), partial(_sentence, source))


def _sentence(source: TaggedSource, decoder: Decoder, raw: bytes, place: Place) -> Document:
    too_long(raw, place)
    words: list[str] = []
    tags: list[str] = []
    numbered = source.word_column != 0
    offset = place.offset
    for line in raw.split(b"\n"):
        where = Place(place.path, offset)
        offset += len(line) + 1
        text = decoder.text(line, where).removeprefix("\ufeff").rstrip("\r")
        if not words and numbered and text.startswith("#") and "\t" not in text:
            continue
        columns = text.split("\t") if "\t" in text else text.split()
        if not columns:  # nothing but a byte order mark, or spaces that are no ASCII
            continue
        if columns[0] == "-DOCSTART-" or (numbered and _NO_WORD.fullmatch(columns[0])):
            continue
        try:
            word, tag = columns[source.word_column], columns[source.tag_column]
        except IndexError:
            raise Invalid(
                where,
                f"has {len(columns)} columns, but {source.word_column} and {source.tag_column} "
                "(from 0) are asked for",
            ) from None
        words.append(word)
        tags.append(class_name(tag, where))
    return Document(tuple(words), tuple(tags), words=True)
