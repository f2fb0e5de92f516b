"""A rule-based sentence splitter for windows of whole sentences, linear in time.

A sentence ends at a paragraph break (an empty line); at . ! ? … with their closing quotes and
brackets, when whitespace and then no lowercase letter follows; and right after the full stops of
Chinese and Japanese. Known abbreviations and initials ("Dr.", "e.g.", "J. S. Bach") do not end
one, nor does a single line end, because text is often wrapped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

MAX_CHARACTERS = 10_000  # a longer sentence is cut, at whitespace if there is any

_ABBREVIATIONS = (
    "mr mrs ms dr prof rev hon sr jr st mt gen col capt lt sgt gov sen rep vs cf ca al approx "
    "e.g i.e viz resp fig figs eq eqs sec ch vol no nos pp ed eds inc ltd co corp dept univ "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_KNOWN_ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
# \uff01, \uff1f and \uff09 are the full-width ! ? and ).
# The leading set of characters makes the search fast: the rest is tried at those only. Possessive
# quantifiers, and runs matched from their first character only, keep it linear.
_CANDIDATE = re.compile(
    r"""[.!?…؟।。\uff01\uff1f｡\n](?:"""
    r"""(?<=[.!?…؟।])(?<![.!?…].)(?P<more>[.!?…؟।]*+)["'”’»)\]]*+\s++"""
    r"""|(?<=[。\uff01\uff1f｡])(?<![。\uff01\uff1f｡].)[。\uff01\uff1f｡]*+[」』”’\uff09》]*+\s*+"""
    r"""|(?<=\n)[ \t\r]*+\n\s*+)"""
)
_EMPTY_LINE = re.compile(r"\n[ \t\r]*\n")
_LAST_WORD = re.compile(r"[^\W\d_]+(?:\.[^\W\d_]+)*$")
_LONGEST_ABBREVIATION = 12
_OPENERS = "\"'“\u2018«([¿¡"
_BOUNDED = re.compile(rf".{{1,{MAX_CHARACTERS}}}(?<=\s)|.{{1,{MAX_CHARACTERS}}}", re.DOTALL)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, with ``"".join(split_sentences(text)) == text``.

    Whitespace belongs to the sentence before it, and to the first sentence at the beginning.
    """
    return [text[start:end] for start, end in itertools.pairwise([0, *sentence_ends(text)])]


def sentence_ends(text: str) -> list[int]:
    """The character positions at which sentences end, increasing; the last is the length."""
    return list(_ends(text))


def _ends(text: str) -> Iterator[int]:
    start = 0
    for candidate in _CANDIDATE.finditer(text):
        end = candidate.end()
        if end == len(text) or not _ends_sentence(text, candidate):
            continue
        # Only a paragraph break can be all of a sentence.
        if candidate["more"] is None and text[start:end].isspace():
            continue
        if end - start > MAX_CHARACTERS:
            yield from _bounded(text, start, end)
        else:
            yield end
        start = end
    if len(text) - start > MAX_CHARACTERS:
        yield from _bounded(text, start, len(text))
    elif start < len(text):
        yield len(text)


def _bounded(text: str, start: int, end: int) -> Iterator[int]:
    """The positions where a very long sentence is cut, and its end."""
    yield from (match.end() for match in _BOUNDED.finditer(text, start, end))


def _ends_sentence(text: str, candidate: re.Match[str]) -> bool:
    more = candidate["more"]
    found = candidate[0]
    if more is None or ("\n" in found and _EMPTY_LINE.search(found)):
        return True
    end = candidate.end()
    following = text[end]
    if following in _OPENERS:
        following = text[end : end + 4].lstrip(_OPENERS)[:1]
    if following.islower():
        return False
    if more or found[0] != ".":
        return True
    before = candidate.start()
    word = _last_word(text[max(0, before - _LONGEST_ABBREVIATION) : before])
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return not is_initial and word.lower() not in _KNOWN_ABBREVIATIONS


def _last_word(text: str) -> str:
    """The letters, with full stops between them, at the end of a text."""
    words = text.split()
    if words and words[-1].isalpha() and not text[-1].isspace():
        return words[-1]  # almost all words; the search is slower
    found = _LAST_WORD.search(text)
    return found[0] if found else ""
