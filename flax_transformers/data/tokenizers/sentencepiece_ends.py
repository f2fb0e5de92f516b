"""How many pieces of a sentencepiece model end before given positions of a text.

The offsets that sentencepiece gives take longer than tokenization, and most pieces are in the
middle of a sentence. Where the text between two positions is normalized as on its own, the bytes of
the normalized parts and of the pieces add up to the same.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

_SPACE = "▁"
_SPACE_BYTES = len(_SPACE.encode())
_WHITESPACE = frozenset(" \t\n\r\u3000")


class SentenceEnds:
    """Counts pieces, given a processor and its ``ModelProto``."""

    def __init__(self, processor: Any, model: Any) -> None:
        rules = model.normalizer_spec
        self._processor = processor
        self._prefix = _SPACE_BYTES if rules.add_dummy_prefix else 0
        self._strips = rules.remove_extra_whitespaces
        self._is_usable = (
            rules.escape_whitespaces
            and not model.trainer_spec.treat_whitespace_as_suffix
            and (rules.add_dummy_prefix or not self._strips)
        )
        self._begins: dict[str, bool] = {}

    def counts(
        self,
        texts: Sequence[str],
        ends: Sequence[Sequence[int]],
        lengths: Sequence[np.ndarray],
    ) -> list[list[int] | None]:
        """For each text how many pieces end at or before its ``ends``, increasing positions in
        characters; None where this takes offsets.

        ``lengths``: the bytes of normalized text of each piece, int64 [n]; -1 if unknown.
        """
        spaces = [self._spaces(*one) for one in zip(texts, ends, strict=True)]
        parts = [
            text[start:end]
            for text, at, known in zip(texts, ends, spaces, strict=True)
            if known is not None
            for start, end in itertools.pairwise([0, *at[: len(known)], len(text)])
        ]
        sizes = iter([len(part.encode()) for part in self._processor.normalize(parts)])
        return [
            None if known is None else self._counted(known, sizes, len(at), own)
            for at, known, own in zip(ends, spaces, lengths, strict=True)
        ]

    def _counted(
        self, spaces: Sequence[int], sizes: Any, positions: int, lengths: np.ndarray
    ) -> list[int] | None:
        """The counts of one text, from the ``sizes`` of its normalized parts in bytes."""
        total, at = next(sizes), []
        for space in spaces:
            at.append(total + space)
            total += next(sizes) - self._prefix + space
        stops = np.cumsum(lengths)
        if not len(stops) or stops[-1] != total or lengths.min() < 0:
            return None
        found: list[int] = np.searchsorted(stops, at, side="right").tolist()
        return found + [len(stops)] * (positions - len(found))

    def _spaces(self, text: str, ends: Sequence[int]) -> list[int] | None:
        """For each end inside a text the bytes of the space that stands for its whitespace and is
        no part of the normalized text before it; None if the parts may not add up."""
        if not self._is_usable or _SPACE in text:
            return None
        spaces = []
        for end in ends:
            if end == len(text):
                break
            before, first = text[end - 1], text[end]
            white = before in _WHITESPACE
            joins = not white and (before.isalnum() or before.isspace())
            if joins or not self._is_plain(first):
                return None
            spaces.append(_SPACE_BYTES if white and self._strips else 0)
        return spaces

    def _is_plain(self, character: str) -> bool:
        """Whether a character at the beginning of a sentence never joins the one before it, and is
        one character when normalized."""
        known = self._begins.get(character)
        if known is None:
            joins = unicodedata.category(character)[0] not in "LNPS"
            normalized = self._processor.normalize(character)
            known = not joins and len(normalized) == (2 if self._prefix else 1)
            self._begins[character] = known
        return known
