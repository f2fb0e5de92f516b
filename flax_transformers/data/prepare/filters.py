"""Which documents of a corpus are let in: length limits, and exact duplicates only once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from flax_transformers import ranges
from flax_transformers.data.sources.documents import Counts, Document
from flax_transformers.errors import UserError
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class Filters:
    """What a document has to be to get into a token store; by default any text will do.

    ``min_characters``, ``max_characters``: limits of a document's length, both sides of a pair
    together; None is no limit.
    ``drop_duplicates``: of documents with the same text, whitespace aside, and the same labels,
    only the first of the corpus stays; one that is also in the validation source does not stay at
    all. It takes one more pass over the corpus, and some 24 bytes of disk a document meanwhile. The
    tokenizer of a mixture is trained before they are looked for.
    """

    min_characters: int = 0
    max_characters: int | None = None
    drop_duplicates: bool = False

    RANGES: ClassVar[Ranges] = {
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
    """The documents that pass; the others are counted.

    ``repeated`` are the numbers of those that an earlier document repeats.
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
