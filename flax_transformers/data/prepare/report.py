"""The report of what preparation left out or changed: counted, printed, and kept in the store.

``report.json`` beside the manifest contains it. A missing or damaged report is ignored, and the
fingerprint of a store does not depend on it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flax_transformers.data.sources.corpus_files import unread_text
from flax_transformers.data.store.files import record_json
from flax_transformers.data.tokenizers.base import Tokenizer
from flax_transformers.storage.folders import Folder

REPORT = "report.json"
_FORMAT = 1
_KEPT = 100
"""Number of the most frequent characters of each kind in the record of a shard."""
_SHOWN = 5
_UNKNOWN_WARNING = 0.01  # share of tokens
_INVALID_WARNING = 0.1  # share of documents
_KINDS = ("unknown_characters", "unknown_within_words", "dropped", "changed")
_PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]


class Characters:
    """Finds characters that a tokenizer does not know, drops, or changes into others.

    Whitespace and changes of case are ignored.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[str, str] | None] = {}
        self._probe(_PRINTABLE)
        plain = "".join(one for one in _PRINTABLE if self._known[one] is None)
        self._of_note = re.compile(rf"[^\s{re.escape(plain)}]")

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """Counts the characters of texts that are not unchanged ASCII."""
        found: Counter[str] = Counter()
        for text in texts:
            found.update(self._of_note.findall(text))
        return found

    def sorted_out(self, counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Counts by kind; a changed character is named "old new"."""
        self._probe([one for one in counts if one not in self._known])
        found: dict[str, dict[str, int]] = {kind: {} for kind in _KINDS}
        for character, count in counts.items():
            what = self._known[character]
            if what is not None:
                found[what[0]][character + what[1]] = count
        return found

    def _probe(self, characters: Sequence[str]) -> None:
        tokenizer = self._tokenizer
        unknown = tokenizer.vocabulary.unk_id
        alone = tokenizer.encode_batch(characters)
        # WordPiece has different tokens at the start of a word and within words.
        within = tokenizer.kind == "wordpiece" and unknown not in tokenizer.encode_batch(["a"])[0]
        inside = tokenizer.encode_batch([f"a{one}" for one in characters]) if within else alone
        for character, ids, others in zip(characters, alone, inside, strict=True):
            self._known[character] = None
            if unknown is not None and unknown in ids:
                self._known[character] = "unknown_characters", ""
            elif unknown is not None and unknown in others:
                self._known[character] = "unknown_within_words", ""
            elif not len(ids):
                self._known[character] = "dropped", ""
            else:
                into = tokenizer.decode(ids.tolist()).strip()
                if into.lower() != character.lower():
                    self._known[character] = ("changed", f" {into}") if into else ("dropped", "")


_characters: dict[str, Characters] = {}


def characters_of(tokenizer: Tokenizer) -> Characters:
    """One `Characters` per tokenizer and process, which caches its results."""
    if tokenizer.fingerprint not in _characters:
        _characters[tokenizer.fingerprint] = Characters(tokenizer)
    return _characters[tokenizer.fingerprint]


class TextFindings:
    """Statistics of a tokenizer on the texts of a shard."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._characters = characters_of(tokenizer)
        self._unknown_id = tokenizer.vocabulary.unk_id
        self._counts: Counter[str] = Counter()
        self._tokens = self._unknown = self._length = 0

    def add(self, texts: Iterable[str], ids: Sequence[np.ndarray]) -> None:
        """Adds texts with their ids."""
        texts = list(texts)
        self._length += sum(map(len, texts))
        self._counts.update(self._characters.count(texts))
        together = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self._tokens += len(together)
        if self._unknown_id is not None:
            self._unknown += int(np.count_nonzero(together == self._unknown_id))

    def record(self) -> dict[str, Any]:
        """The statistics as JSON, for `added_up`."""
        kinds = self._characters.sorted_out(self._counts)
        totals = {f"{kind}_total": sum(counts.values()) for kind, counts in kinds.items()}
        kept = {kind: dict(_most(counts, _KEPT)) for kind, counts in kinds.items()}
        found = {"tokens": self._tokens, "unknown": self._unknown, "characters": self._length}
        return found | totals | kept


def _most(counts: Mapping[str, int], number: int) -> list[tuple[str, int]]:
    """The most frequent names; equally frequent ones sorted by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]


def added_up(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of nested records of numbers."""
    total: dict[str, Any] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, Mapping):
                total[name] = added_up([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def write_report(folder: Folder, report: Mapping[str, Any]) -> None:
    """Writes a report. ``report``: bytes of the files ``read``; ``unread`` files (kind: [count,
    bytes]); ``documents``; ``left_out`` and ``cut`` (see `Counts`); ``tokenizers``: the sum of
    `TextFindings` of each."""
    folder.write(REPORT, record_json({"format": _FORMAT, **report}))


def print_report(folder: Folder) -> None:
    """Prints the report of a store on stderr."""
    if lines := report_lines(folder):
        print(f"Report of the store in {folder.path}:", file=sys.stderr)
    for line in lines:
        print(f"  {line}", file=sys.stderr)


def report_lines(folder: Folder) -> list[str]:
    """The lines of the report of a store; empty if it is missing or damaged."""
    try:
        report = json.loads(folder.read(REPORT))
        if report["format"] != _FORMAT:
            return []
        return [*_corpus_lines(report), *_tokenizer_lines(report["tokenizers"])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _corpus_lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    unread = {kind: (count, size) for kind, (count, size) in report["unread"].items()}
    if unread:
        size = sum(size for _, size in unread.values())
        line = f"Not read: {unread_text(unread)}"
        if size > report["read"]:
            share = size / (size + report["read"])
            line = f"WARNING: {line}; these are {share:.0%} of the bytes of the corpus"
        lines.append(line)
    if report["cut"]:
        lines.append(f"Cut: {report['cut']:,} times, because a text was longer than 16 MiB")
    invalid, documents = report["left_out"]["invalid"], report["documents"]
    if invalid > _INVALID_WARNING * (invalid + documents):
        lines.append(
            f"WARNING: {invalid:,} documents were invalid, and {documents:,} are in the store; "
            "prepare with on_invalid error to see the first of them"
        )
    return lines


def _tokenizer_lines(tokenizers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, found in tokenizers.items():
        of = "" if name == "tokenizer" else " of the targets"
        if found["unknown"]:
            share = found["unknown"] / found["tokens"]
            line = f"Unknown tokens{of}: {found['unknown']:,} of {found['tokens']:,} ({share:.2%})"
            if characters := _shown(found["unknown_characters"]):
                line += f"; characters that the tokenizer lacks: {characters}"
            elif characters := _shown(found["unknown_within_words"]):
                line += f"; characters that the tokenizer lacks within words: {characters}"
            if share > _UNKNOWN_WARNING:
                line = f"WARNING: {line}; use a tokenizer that was trained on such text"
            lines.append(line)
        for kind in ("dropped", "changed"):
            if found[f"{kind}_total"]:
                lines.append(
                    f"Characters{of} {kind} by the tokenizer: {found[f'{kind}_total']:,} of "
                    f"{found['characters']:,}, most often {_shown(found[kind])}"
                )
    return lines


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{_named(name)} {count:,} times" for name, count in _most(counts, _SHOWN))


def _named(name: str) -> str:
    """A character with its code point, and what it is changed to."""
    character, into = name[0], name[1:].lstrip()
    shown = f"{character!r} " if character.isprintable() else ""
    return f"{shown}U+{ord(character):04X}" + (f" to {into!r}" if into else "")
