"""Sentences with a tag for each word, in CoNLL-U and other column formats."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.data.sources.documents import Decoder, Document, Invalid, LabelKind
from flax_transformers.data.sources.files import Place
from flax_transformers.data.sources.labelled import class_name
from flax_transformers.data.sources.records import Part, Source, TextFile, too_long

_NO_WORD = re.compile(r"\d+[-.]\d+")  # "3-4" is a range of words, "3.1" an empty node


@dataclass(frozen=True)
class TaggedSource(Source):
    """A corpus of tagged sentences; used like a `TextSource` (``TextData.source``).

    ``path``: a file, a folder or a glob of CoNLL-U files, or of any files with one word per line,
    columns separated by tabs or blanks, and an empty line after each sentence; compressed or not.
    ``word_column``, ``tag_column``: from 0, or negative from the end. The defaults are the form and
    the universal tag of CoNLL-U; for entities (IOB2) with a word number in front use 1 and 2, for
    CoNLL-2003 0 and 3.
    ``label_names``: the tags in the order of their numbers; default: those of the training
    sentences, sorted.

    As in the evaluation of Universal Dependencies, ranges of words ("3-4") and empty nodes ("3.1")
    are skipped, and so are -DOCSTART- and comments before a sentence: lines that begin with "#" and
    have no tab, or not as many columns as the words. In a file whose first column is the word, a
    comment is recognized by its columns alone. A sentence with a missing
    column, with lines of different numbers of columns, or with an unknown tag is invalid. Words are
    tokenized by `Tokenizer.encode_words`.
    """

    word_column: int = 1
    tag_column: int = 3
    label_names: tuple[str, ...] = ()

    endings: ClassVar[tuple[str, ...]] = (".conllu", ".iob2", ".conll", ".tsv", ".txt")

    RANGES: ClassVar[ranges.Ranges] = dict.fromkeys(
        ("word_column", "tag_column"), ranges.integers(-10_000, 10_000)
    )

    label_kind: ClassVar[LabelKind] = "tags"
    store_version: ClassVar[int] = 3
    """1: a comment with a tab made its sentence invalid. 2: of bytes, tags were at spaces."""

    def parts(self, *, tagged: bool = True) -> Iterator[Part]:
        """See `Source`. Unless ``tagged``, tags are not read, and may be missing."""
        for _, path in self.files():
            parse = partial(_sentence, self, tagged)
            yield Part(TextFile(path, "blank_line", cut=False), parse)


def _sentence(
    source: TaggedSource, tagged: bool, decoder: Decoder, raw: bytes, place: Place
) -> Document:
    too_long(raw, place)
    words: list[str] = []
    tags: list[str] = []
    numbered = source.word_column != 0
    count = 0  # of columns
    offset = place.offset
    lines = raw.split(b"\n")
    plain = [line for line in lines if line.strip() and not line.startswith(b"#")]
    width = len(_columns(plain[-1].decode(errors="replace"))) if plain else 0
    for line in lines:
        where = Place(place.path, offset)
        offset += len(line) + 1
        text = decoder.text(line, where).removeprefix("\ufeff").rstrip("\r")
        columns = _columns(text)
        others = len(columns) != width and (numbered or width > 0)
        if not words and text.startswith("#") and (others or (numbered and "\t" not in text)):
            continue  # a comment
        if not columns:  # only a byte order mark, or spaces outside ASCII
            continue
        if columns[0] == "-DOCSTART-" or (numbered and _NO_WORD.fullmatch(columns[0])):
            continue
        asked = (source.word_column, source.tag_column) if tagged else (source.word_column,)
        try:
            word, *tag = (columns[column] for column in asked)
        except IndexError:
            raise Invalid(
                where,
                f"has {len(columns)} columns, but {' and '.join(map(str, asked))} "
                "(from 0) are asked for",
            ) from None
        count = count or len(columns)
        if len(columns) != count:  # a blank in a word, or a column that is missing
            raise Invalid(where, f"has {len(columns)} columns, but the word before has {count}")
        words.append(word)
        tags += [class_name(one, where) for one in tag]
    return Document(tuple(words), tuple(tags), words=True)


def _columns(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()
