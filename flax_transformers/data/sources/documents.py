"""A document as every source gives it, and what holds of the valid and the invalid ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flax_transformers import ranges

LONGEST = 1 << 24
"""Bytes of a document or a row at most, so that none needs much memory."""

LabelKind = Literal["classes", "tags", "numbers", "spans"]
"""What labels are: the name of a class, or one for each word, a number to come near to, or
stretches of a text."""


@dataclass(frozen=True)
class Source:
    """A corpus, described by plain values; each kind of source adds the fields it needs.

    ``path``: a file, a folder (all known endings below it, sorted) or a glob; or
    "tfds:NAME[/CONFIG][:VERSION]", or "tfds:/folder/of/a/prepared/builder".
    ``split``: TFDS only, slices as "train[:10%]" included.
    ``on_invalid``: what becomes of documents that are not valid: "error" stops with file and place,
    "skip" leaves the document out, "replace" puts U+FFFD for bad bytes and leaves out the rest.
    """

    path: str = "embedded"
    split: str = "train"
    on_invalid: Literal["error", "skip", "replace"] = "error"

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.source")

    @property
    def label_kind(self) -> LabelKind | None:
        """What its documents have to be learned of them besides their text."""
        return None

    @property
    def texts(self) -> int:
        """How many texts a labelled document has that stand apart in a row."""
        return 1


@dataclass(frozen=True)
class Document:
    """One document. ``text`` is one text, which is cut into sentences when it is tokenised, or
    several that stay as they are: the sides of a pair, or, with ``words``, the words of a sentence.

    ``labels`` are what has to be learned of it, names or numbers. Documents of one ``group`` are
    held out together; without one the text itself decides.
    """

    text: str | tuple[str, ...]
    labels: tuple[str, ...] | tuple[float, ...] = ()
    group: str | None = None
    words: bool = False

    @property
    def whole(self) -> str:
        """All of the text as one string; texts that stand apart are joined by NUL."""
        if isinstance(self.text, str):
            return self.text
        return ("\0 " if self.words else "\0").join(self.text)


@dataclass
class Counts:
    """What a reader saw: documents given out, empty ones skipped, invalid ones (any policy).

    And what the filters left out of those: too short, too long, repeats. ``cut``: how often a text
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
        """The documents that were left out, by reason."""
        kept = ("documents", "cut")
        return {name: count for name, count in vars(self).items() if name not in kept}


Where = object
"""Where a record is; ``str`` of it is for people, and may have to count lines in a file."""


class Invalid(Exception):
    """A document that is not valid: where it is, and what is wrong.

    The message is only put together when it is asked for.
    """

    def __init__(self, where: Where, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where} {self.problem}"


@dataclass
class Decoder:
    """Turns stored bytes into text by the source's policy; raises `Invalid`.

    ``replaced`` becomes True when bytes had to be replaced.
    """

    replace: bool
    replaced: bool = False

    def text(self, raw: bytes, where: Where, offset: int = 0) -> str:
        """``raw`` as UTF-8; ``offset`` is its first byte's place in what ``where`` names."""
        if len(raw) > LONGEST:
            raise Invalid(where, f"is longer than {LONGEST >> 20} MiB")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            if not self.replace:
                raise Invalid(
                    where, f"is not valid UTF-8 at byte {offset + error.start}"
                ) from error
            self.replaced = True
            return raw.decode(errors="replace")


def listed(names: Iterable[str]) -> str:
    """Names for a message, the first twenty of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:20] + ["..."] * (len(shown) > 20)) or "none"
