"""Documents as sources yield them, and errors of invalid ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

LONGEST = 1 << 24
"""Maximum bytes of a document or record, to bound the memory."""

LARGEST_NUMBER = float(np.finfo(np.float32).max)
"""Numbers are stored in float32."""

LabelKind = Literal["classes", "tags", "numbers", "spans", "choices"]
"""Kinds of labels: the name of a class, one name per word, a number, spans of a text, or which of
several texts is right."""


@dataclass(frozen=True)
class Document:
    """One document. ``text`` is one text, which is split into sentences when it is tokenized, or
    several: the sides of a pair, or, with ``words``, the words of a sentence.

    ``labels``: names or numbers. ``arrays``: labels in the form of the store, of a document that
    computes them itself, in the order of `token_store.LABELS`. Documents of one ``group`` are held
    out together; without a group the text decides.
    """

    text: str | tuple[str, ...]
    labels: tuple[str, ...] | tuple[float, ...] = ()
    group: str | None = None
    words: bool = False
    arrays: tuple[Any, ...] | None = field(default=None, compare=False)

    @property
    def whole(self) -> str:
        """The text as one string; separate texts are joined by NUL."""
        if isinstance(self.text, str):
            return self.text
        return ("\0 " if self.words else "\0").join(self.text)


@dataclass
class Counts:
    """Number of documents that a reader yielded, and of empty and invalid ones.

    And of those that the filters left out: too short, too long, repeated. ``cut``: how often a text
    that was too long for one document was continued in another.
    """

    documents: int = 0
    empty: int = 0
    invalid: int = 0
    short: int = 0
    long: int = 0
    duplicates: int = 0
    cut: int = 0

    def left_out(self) -> dict[str, int]:
        """Number of documents that were left out, by reason."""
        kept = ("documents", "cut")
        return {name: count for name, count in vars(self).items() if name not in kept}


Where = object
"""Where a record is; ``str`` of it is for messages, and may count lines in a file."""


class Invalid(Exception):
    """An invalid document: where it is, what is wrong and, if it is known, what to do about it. The
    message is created on demand."""

    def __init__(self, where: Where, problem: str, remedy: str = "") -> None:
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        return f"{self.where} {self.problem}"


@dataclass
class Decoder:
    """Decodes bytes by the source's policy; raises `Invalid`.

    ``replaced`` becomes True when bytes are replaced. In UTF-16 and in compressed data nothing is
    replaced, because nothing of the text would be left.
    """

    replace: bool
    replaced: bool = False

    def text(self, raw: bytes, where: Where, offset: int = 0) -> str:
        """``raw`` as UTF-8; ``offset``: position of its first byte in ``where``."""
        if len(raw) > LONGEST:
            raise Invalid(where, f"is longer than {LONGEST >> 20} MiB")
        if raw.count(0) > len(raw) // 3 and len(raw) > 3:
            raise Invalid(where, "is not UTF-8: many of its bytes are NUL", _OF_UTF_16)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            known = next((found for begin, found in _BEGINNINGS if raw.startswith(begin)), None)
            if known or not self.replace:
                problem = f"is not valid UTF-8 at byte {offset + error.start}"
                raise Invalid(where, problem, known or _CONVERT.format("LATIN1")) from error
            self.replaced = True
            return raw.decode(errors="replace")

    def unpaired(self, text: str, where: Where) -> str:
        """``text`` that has halves of surrogate pairs, which escapes in JSON can be."""
        if not self.replace:
            raise Invalid(where, "is not valid UTF-8: it has half of a surrogate pair")
        self.replaced = True
        return text.encode("utf-8", "surrogatepass").decode(errors="replace")


_CONVERT = "convert it, as with iconv -f {} -t UTF-8"
_OF_UTF_16 = _CONVERT.format("UTF-16")
_BEGINNINGS = (
    (b"\xff\xfe", _OF_UTF_16),
    (b"\xfe\xff", _OF_UTF_16),
    (b"\x1f\x8b", "it is compressed by gzip: add .gz to its name"),
    (b"BZh", "it is compressed by bzip2: add .bz2 to its name"),
    (b"\xfd7zXZ\x00", "it is compressed by xz: add .xz to its name"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd: add .zst to its name"),
)
"""What to do about bytes that are not UTF-8, by how they begin."""


def listed(names: Iterable[str]) -> str:
    """At most twenty names, for a message."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:20] + ["..."] * (len(shown) > 20)) or "none"
