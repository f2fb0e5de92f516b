"""Filters of documents: limits of length, and exact duplicates only once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.errors import UserError


@dataclass(frozen=True)
class Filters:
    """Which documents are kept; by default all.

    ``min_characters``, ``max_characters``: limits of a document's length, of both sides of a pair
    together; None is no limit.
    ``drop_duplicates``: of documents with the same text, ignoring whitespace, and the same labels,
    keep the first in the corpus, and none that is also in the validation source. Needs one more
    pass over the corpus, and about 24 bytes of disk per document meanwhile. The tokenizer of a
    mixture is trained before.
    """

    min_characters: int = 0
    max_characters: int | None = None
    drop_duplicates: bool = False

    RANGES: ClassVar[ranges.Ranges] = {
        "min_characters": ranges.integers(0),
        "max_characters": ranges.integers(),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "data.filters")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise UserError(
                f"data.filters.max_characters is {self.max_characters}; it must be at least "
                f"data.filters.min_characters, {self.min_characters}"
            )


def let_in(
    documents: Iterable[tuple[int, Document]],
    filters: Filters,
    counts: Counts,
    repeated: Collection[int] = (),
) -> Iterator[tuple[int, Document]]:
    """The documents that pass the filters; the others are counted.

    ``repeated``: the numbers of documents that repeat an earlier one.
    """
    most = float("inf") if filters.max_characters is None else filters.max_characters
    for number, document in documents:
        characters = len(document.whole)
        if characters < filters.min_characters:
            counts.short += 1
        elif characters > most:
            counts.long += 1
        elif number in repeated:
            counts.duplicates += 1
        else:
            yield number, document
